"""Options of `pd-serve simulate` that are more than a number."""

from collections.abc import Iterable, Sequence

from pd_serve.config import parse_bounds
from pd_serve.errors import InvalidRequestError
from router.scaling import PoolBounds

DEFAULT_INSTANCES = 16


def instances(neutral: int | None, prefill: int, decode: int) -> dict[str, int]:
    """Number of instances at the start, by role: neutral, or prefill and decode, or all three.

    Raises:
        InvalidRequestError: No instance could prefill, or none decode.
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
    """Bounds by role from `MIN:MAX` for all roles, or `ROLE=MIN:MAX` for one.

    Raises:
        InvalidRequestError: The text is neither, or there is no such role.
    """
    found: dict[str, PoolBounds] = {}
    for text in texts:
        role, equals, span = text.rpartition("=")
        if equals and role not in roles:
            raise InvalidRequestError(f"--autoscale {text}: there are no {role} instances")
        try:
            found |= dict.fromkeys([role] if equals else roles, parse_bounds(span))
        except ValueError as error:
            raise InvalidRequestError(f"--autoscale: {error}") from None
    return found
