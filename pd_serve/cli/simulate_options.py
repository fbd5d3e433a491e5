"""Options of the command line that are more than a number."""

from collections.abc import Iterable, Sequence

from pd_serve.config import parse_bounds
from pd_serve.errors import InvalidRequestError
from router.scaling import PoolBounds

DEFAULT_INSTANCES = 16


def instances(neutral: int | None, prefill: int, decode: int) -> dict[str, int]:
    """The cluster at the beginning, by role: neutral instances, or prefill and decode ones, or all three.

    Raises:
        InvalidRequestError: Nothing in it could prefill, or nothing decode.
    """
    if neutral is None:
        neutral = 0 if prefill or decode else DEFAULT_INSTANCES
    if not neutral and not (prefill and decode):
        raise InvalidRequestError(
            "--prefill and --decode must both be at least 1 without neutral --instances"
        )
    counts = {"prefill": prefill, "decode": decode, "neutral": neutral}
    return {role: count for role, count in counts.items() if count}


def bounds(texts: Iterable[str], roles: Sequence[str]) -> dict[str, PoolBounds]:
    """`MIN:MAX` for every role that there is, or `ROLE=MIN:MAX` for one.

    Raises:
        InvalidRequestError: It is neither, or there is no such role.
    """
    found: dict[str, PoolBounds] = {}
    for text in texts:
        role, equals, span = text.rpartition("=")
        if equals and role not in roles:
            raise InvalidRequestError(f"--autoscale {text}: there are no {role} instances")
        found |= dict.fromkeys([role] if equals else roles, parse_bounds("--autoscale", span))
    return found


def settings(texts: Iterable[str]) -> dict[str, float | int | str]:
    """`KEY=VALUE`, as numbers where they are.

    Raises:
        InvalidRequestError: There is no `=`.
    """
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
