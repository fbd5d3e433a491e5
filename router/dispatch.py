"""Where a new request starts, and where it is handed off to. Pure functions over load snapshots."""

from collections.abc import Iterable, Mapping

from router.load import InstanceLoad, freeness

#: Roles that take new requests.
PREFILL_ROLES = ("prefill", "neutral")


def can_start(load: InstanceLoad) -> bool:
    """New requests go to prefill instances only; neutral ones do both."""
    return load.role in PREFILL_ROLES and not load.draining


def choose_prefill(loads: Iterable[InstanceLoad], pending_tokens: Mapping[str, int]) -> str | None:
    """The instance with the smallest prefill backlog; ties go to the smaller batch, then by name.

    Args:
        pending_tokens: Prompt tokens dispatched to an instance that its last report has not seen.

    Returns:
        An instance id, or None if no instance takes new requests.
    """

    def backlog(load: InstanceLoad) -> tuple[int, int, str]:
        tokens = load.waiting_tokens + pending_tokens.get(load.instance_id, 0)
        return tokens, load.running + load.waiting, load.instance_id

    candidates = [load for load in loads if can_start(load)]
    return min(candidates, key=backlog).instance_id if candidates else None


def rank_destinations(
    loads: Iterable[InstanceLoad], pending_blocks: Mapping[str, int], num_blocks: int
) -> list[str]:
    """Decode instances that a request of `num_blocks` may be handed off to, freest first.

    An instance that looks too full now comes last instead of being left out: by the time the prompt is
    prefilled it may have room, and it refuses by itself if not.

    Args:
        pending_blocks: Demand decided on for an instance that its last report has not seen.
    """

    def preference(load: InstanceLoad) -> tuple[bool, float, str]:
        extra = pending_blocks.get(load.instance_id, 0)
        fits = load.free_blocks - extra >= num_blocks
        return not fits, -freeness(load, extra + num_blocks), load.instance_id

    candidates = [load for load in loads if load.role == "decode" and not load.draining]
    return [load.instance_id for load in sorted(candidates, key=preference)]
