"""Types of settings, and the texts that they are parsed from."""

import json
import shlex
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_settings import NoDecode

from pd_serve.errors import InvalidRequestError
from router.scaling import PoolBounds


def parse_bounds(text: str) -> PoolBounds:
    """The bounds of a pool from "MIN:MAX". Raises: ValueError."""
    least, _, most = text.partition(":")
    if not (least.isdecimal() and most.isdecimal()):
        raise ValueError(f"takes MIN:MAX, such as 1:4, not {text!r}")
    if not 1 <= int(least) <= int(most):
        raise ValueError(f"{text}: must be 1 <= MIN <= MAX")
    return PoolBounds(int(least), int(most))


def parse_resources(text: str) -> dict[str, float]:
    """Custom resources of Ray from JSON: {"name": amount}. Raises: ValueError."""
    try:
        found = {str(name): float(amount) for name, amount in json.loads(text).items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f'takes JSON such as {{"node_a": 1}}, not {text!r}') from None
    if bad := sorted(name for name, amount in found.items() if amount <= 0 or name in ("CPU", "GPU")):
        raise ValueError(f"{bad[0]} must be a custom resource of Ray, with an amount above 0")
    return found


def parse_settings(texts: Iterable[str]) -> dict[str, float | int | str]:
    """Settings of a policy from "KEY=VALUE" each; numbers become numbers. Raises: InvalidRequestError."""
    found: dict[str, float | int | str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise InvalidRequestError(f"--set {text}: must be KEY=VALUE")
        found[key.strip()] = _number(value.strip())
    return found


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _if_text(parse: Any) -> BeforeValidator:
    """Parses a text, and takes a value of the field's own type as it is."""
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


Bounds = Annotated[PoolBounds | None, NoDecode, _if_text(parse_bounds)]
Resources = Annotated[dict[str, float] | None, NoDecode, _if_text(parse_resources)]
Words = Annotated[tuple[str, ...], NoDecode, _if_text(shlex.split)]
Keys = Annotated[tuple[str, ...], NoDecode, _if_text(lambda key: (key,))]
#: Kubernetes sets PD_SERVE_PORT=tcp://... in the pods beside a Service named pd-serve; that is no setting.
Port = Annotated[int, BeforeValidator(lambda port: 8000 if str(port).startswith("tcp://") else port)]
