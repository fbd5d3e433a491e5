"""Types of settings, and the texts that they are parsed from."""

import json
import math
import shlex
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_settings import NoDecode

from pd_serve.errors import InvalidRequestError
from router.rate_limits import KeyLimits
from router.scaling import PoolBounds
from router.slo import Slo

#: Suffixes of times, in seconds.
UNITS = {"ms": 1e-3, "s": 1.0, "": 1.0}

#: Greatest bounds on the time to first token and on the time per later token, in seconds. A greater one on
#: the latter is a mistake in the unit.
MAX_TTFT_S, MAX_TPOT_S = 3600.0, 5.0


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


def parse_slo(text: str) -> Slo:
    """Targets from `ttft=TIME,itl=TIME` or one of them, in seconds or with a unit.

    `tpot` is another name of `itl`: the mean time per token after the first.

    Raises: ValueError.
    """
    bounds: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        name = "itl" if name == "tpot" else name
        number = value.rstrip("ms")
        try:
            seconds = float(number) * UNITS[value[len(number) :]]
        except (ValueError, KeyError):
            seconds = 0.0
        if name not in ("ttft", "itl") or name in bounds or not 0 < seconds < math.inf:
            raise ValueError(f"{text}: must be such as ttft=500ms,itl=25ms")
        bounds[name] = seconds
    return checked_slo(bounds.get("ttft", math.inf), bounds.get("itl", math.inf))


def checked_slo(ttft_s: float, tpot_s: float = math.inf) -> Slo:
    """Targets in seconds; infinite for none. Raises: ValueError: one is out of its range."""
    if not (ttft_s == math.inf or 0 < ttft_s <= MAX_TTFT_S):
        raise ValueError(f"{ttft_s:.10g} s to the first token: must be above 0 and at most {MAX_TTFT_S:g} s")
    if not (tpot_s == math.inf or 0 < tpot_s <= MAX_TPOT_S):
        raise ValueError(
            f"{tpot_s:.10g} s per token: must be above 0 and at most {MAX_TPOT_S:g} s;"
            " write ms for milliseconds"
        )
    return Slo(ttft_s, tpot_s)


def parse_key_limits(text: str) -> KeyLimits:
    """Limits of an API key from `rpm=60,tpm=100000` or one of them. Raises: ValueError."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in KeyLimits._fields or name in found or not value.isdecimal() or not int(value):
            raise ValueError(f"{text}: must be such as rpm=60,tpm=100000")
        found[name] = int(value)
    return KeyLimits(**found)


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
Limits = Annotated[KeyLimits | None, NoDecode, _if_text(parse_key_limits)]
Targets = Annotated[Slo | None, NoDecode, _if_text(parse_slo)]
Words = Annotated[tuple[str, ...], NoDecode, _if_text(shlex.split)]
Keys = Annotated[tuple[str, ...], NoDecode, _if_text(lambda key: (key,))]
#: Kubernetes sets PD_SERVE_PORT=tcp://... in the pods beside a Service named pd-serve; that is no setting.
Port = Annotated[int, BeforeValidator(lambda port: 8000 if str(port).startswith("tcp://") else port)]
