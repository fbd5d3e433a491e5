"""Types of settings, and the texts that they are parsed from."""

import difflib
import json
import math
import os
import shlex
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_settings import NoDecode

from pd_serve.errors import InvalidRequestError
from router.rate_limits import KeyLimits
from router.scaling import PoolBounds
from router.slo import Slo

#: Suffixes of times, in seconds.
UNITS = {"ms": 1e-3, "s": 1.0, "": 1.0}

#: Limit of a pool's size: all instances are started at once, and numbers must fit into a message.
MAX_INSTANCES = 10_000

#: How like a setting's name one in the environment, both with their prefix, counts as misspelt.
MISSPELT = 0.93

#: Greatest bounds on the time to first token and on the time per later token, in seconds. A greater one on
#: the latter is a mistake in the unit.
MAX_TTFT_S, MAX_TPOT_S = 3600.0, 5.0


def parse_bounds(text: str) -> PoolBounds:
    """The bounds of a pool from "MIN:MAX". Raises: ValueError."""
    least, _, most = text.partition(":")
    if not (least.isdecimal() and most.isdecimal()):
        raise ValueError(f"takes MIN:MAX, such as 1:4 (in YAML in quotes, '1:4'), not {text!r}")
    if not 1 <= int(least) <= int(most) <= MAX_INSTANCES:
        raise ValueError(f"{text}: must be 1 <= MIN <= MAX <= {MAX_INSTANCES}")
    return PoolBounds(int(least), int(most))


def parse_resources(given: str | Mapping[str, Any]) -> dict[str, float]:
    """Custom resources of Ray, {"name": amount}, or JSON of them. Raises: ValueError."""
    try:
        amounts = json.loads(given) if isinstance(given, str) else given
        found = {str(name): float(amount) for name, amount in amounts.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f'takes JSON such as {{"node_a": 1}}, not {given!r}') from None
    wrong = (name for name, amount in found.items() if not 0 < amount < math.inf or name in ("CPU", "GPU"))
    if bad := sorted(wrong):
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


def parse_words(given: str | Iterable[str]) -> tuple[str, ...]:
    """Words of a text, or those of a list. Raises: ValueError."""
    if isinstance(given, str):
        return tuple(shlex.split(given))
    if not isinstance(given, list | tuple) or not all(isinstance(word, str) for word in given):
        raise ValueError(f"takes a text, or a list of texts, not {given!r}")
    return tuple(given)


def did_you_mean(name: str, known: Collection[str], cutoff: float = 0.6) -> str:
    """The known name that is like `name`, as the end of a message; "" if there is none."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def refuse_misspelt(prefix: str, settings: Collection[str]) -> None:
    """Refuses variables of the environment that are nearly the name of a setting.

    Others are none of ours: Kubernetes sets PD_SERVE_SERVICE_HOST beside a Service named pd-serve.

    Raises:
        InvalidRequestError: With the name that was probably meant.
    """
    known = [prefix + name.upper() for name in settings]
    for name in sorted(os.environ.keys() - set(known)):
        hint = did_you_mean(name, known, cutoff=MISSPELT) if name.startswith(prefix) else ""
        if hint:
            raise InvalidRequestError(f"environment: no setting {name}{hint}")


def message_of(error: Any) -> str:
    """The message of one of pydantic's errors, with its flag."""
    flag = "--" + str(error["loc"][0]).lower().replace("_", "-") if error["loc"] else ""
    said = error["msg"].removeprefix("Value error, ")
    return f"{flag}: {said}" if error["type"] != "extra_forbidden" else f"unknown setting {error['loc'][0]!r}"


def _parsed(parse: Any, *own: type) -> BeforeValidator:
    """Takes None and values of the types `own` as they are, and the text of anything else."""
    return BeforeValidator(
        lambda value: value if value is None or isinstance(value, own) else parse(str(value))
    )


Bounds = Annotated[PoolBounds | None, NoDecode, _parsed(parse_bounds, PoolBounds)]
Resources = Annotated[
    dict[str, float] | None,
    NoDecode,
    BeforeValidator(lambda given: None if given is None else parse_resources(given)),
]
Limits = Annotated[KeyLimits | None, NoDecode, _parsed(parse_key_limits, KeyLimits)]
Targets = Annotated[Slo | None, NoDecode, _parsed(parse_slo, Slo)]
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(parse_words)]
Keys = Annotated[
    tuple[str, ...], NoDecode, BeforeValidator(lambda key: (key,) if isinstance(key, str) else key)
]
#: Kubernetes sets PD_SERVE_PORT=tcp://... in the pods beside a Service named pd-serve; that is no setting.
Port = Annotated[int, BeforeValidator(lambda port: 8000 if str(port).startswith("tcp://") else port)]
