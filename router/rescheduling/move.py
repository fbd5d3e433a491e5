"""Moves of requests between instances, and the interface of the policies that decide on them."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from router.load import InstanceLoad
from router.plugins import PolicyChoice
from router.settings import PolicySet


class MoveOrder(msgspec.Struct, frozen=True):
    """An order to move one request. The source chooses the request; see `router.rescheduling.selection`.

    Attributes:
        destination: Its projected load, earlier moves included, this one not.
        reason: "balance", "defragment" (to make room for a queued or preempted request) or "drain".
        selection: The policy that the source chooses by.
        num_blocks: Assumed size of the request until the source has chosen one.
    """

    source: str
    destination: InstanceLoad
    reason: str
    selection: PolicyChoice
    num_blocks: int


class ReschedulingPolicy(Protocol):
    """Decides on moves, in the scheduler."""

    def moves(self, loads: Sequence[InstanceLoad], policies: PolicySet) -> list[MoveOrder]:
        """The moves to order now.

        Args:
            loads: Projected loads of all instances: moves that are ordered and not reported are counted in.
        """
        ...


class NoMoves:
    """Requests stay where they are, except for hand-offs."""

    def moves(self, loads: Sequence[InstanceLoad], policies: PolicySet) -> list[MoveOrder]:
        return []


def pools(loads: Iterable[InstanceLoad]) -> list[list[InstanceLoad]]:
    """Instances that may move requests among each other. Prefill instances only hand off."""
    by_role: dict[str, list[InstanceLoad]] = {"neutral": [], "decode": []}
    for load in loads:
        if load.role in by_role:
            by_role[load.role].append(load)
    return list(by_role.values())


def make_move(source: InstanceLoad, destination: InstanceLoad, policies: PolicySet) -> MoveOrder:
    """The move, with its reason."""
    reason, selection = "balance", policies.choice("selection")
    if source.draining:
        reason, selection = "drain", PolicyChoice("drain")
    elif source.preempted or source.head_of_line_blocks > source.free_blocks - source.watermark_blocks:
        reason = "defragment"
    return MoveOrder(source.instance_id, destination, reason, selection, source.mean_blocks)
