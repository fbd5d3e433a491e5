"""What every rescheduling policy answers: which instance gives a request to which."""

from collections.abc import Callable, Iterable, Sequence

import msgspec

from router.load import InstanceLoad
from router.policies import PolicySet


class Move(msgspec.Struct, frozen=True):
    """One request is to go. Which one, the source chooses; see `router.rescheduling.selection`.

    Attributes:
        destination: As it is before this move and after those decided before it.
        reason: "balance", "defragment" (a queued request or a preempted one needs the room) or "drain".
        victim: The rule that the source chooses by.
        num_blocks: What the request is taken to hold, until it is chosen.
    """

    source: str
    destination: InstanceLoad
    reason: str
    victim: str
    num_blocks: int


#: The moves to be made now. Loads have the moves that are decided and not yet reported counted in.
Rescheduling = Callable[[Sequence[InstanceLoad], PolicySet], list[Move]]


def pools(loads: Iterable[InstanceLoad]) -> list[list[InstanceLoad]]:
    """Instances that may move requests among each other. Prefill instances hand off, and nothing else."""
    by_role: dict[str, list[InstanceLoad]] = {"neutral": [], "decode": []}
    for load in loads:
        if load.role in by_role:
            by_role[load.role].append(load)
    return list(by_role.values())


def move(source: InstanceLoad, destination: InstanceLoad, policies: PolicySet) -> Move:
    """The move, with the reason for it."""
    reason, victim = "balance", policies.victim
    if source.draining:
        reason, victim = "drain", "drain"
    elif source.preempted or source.head_of_line_blocks > source.free_blocks - source.watermark_blocks:
        reason = "defragment"
    return Move(source.instance_id, destination, reason, victim, source.mean_blocks)
