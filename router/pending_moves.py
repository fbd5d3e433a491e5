"""Moves that are decided and that no report has seen yet."""

from collections import deque
from dataclasses import dataclass

from msgspec.structs import replace

from router.load import InstanceLoad
from router.rescheduling import Move

#: An order that no report has answered for so long is lost, or went to somebody who does not count them.
LOST_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class PendingMove:
    """Attributes:
    number: The source's count of decided orders once it has decided on this one.
    """

    number: int
    decided_at: float
    destination: str
    num_blocks: int


class PendingMoves:
    """Corrects loads by the moves under way to their sources, so that no round repeats the last one's.

    From the source's choice on, the migration itself is in both reports.
    """

    def __init__(self) -> None:
        self._orders: dict[str, deque[PendingMove]] = {}  # by source

    def add(self, move: Move, source: InstanceLoad, now: float) -> None:
        """Args: `source` is its latest report."""
        orders = self._orders.setdefault(move.source, deque())
        number = (orders[-1].number if orders else source.moves_decided) + 1
        orders.append(PendingMove(number, now, move.destination.instance_id, move.num_blocks))

    def seen(self, load: InstanceLoad) -> None:
        """A report has come."""
        orders = self._orders.get(load.instance_id)
        while orders and orders[0].number <= load.moves_decided:
            orders.popleft()

    def remove(self, instance_id: str) -> None:
        self._orders.pop(instance_id, None)

    def correct(self, loads: list[InstanceLoad], now: float) -> list[InstanceLoad]:
        """The loads, as if every order had become a migration."""
        leaving: dict[str, int] = {}
        arriving: dict[str, list[int]] = {}
        for source, orders in self._orders.items():
            while orders and orders[0].decided_at < now - LOST_AFTER_S:
                orders.popleft()
            leaving[source] = len(orders)
            for order in orders:
                arriving.setdefault(order.destination, []).append(order.num_blocks)
        if not arriving:
            return loads
        return [_corrected(load, leaving, arriving) for load in loads]


def _corrected(load: InstanceLoad, leaving: dict[str, int], arriving: dict[str, list[int]]) -> InstanceLoad:
    if count := leaving.get(load.instance_id, 0):
        load = replace(load, migrating_out=load.migrating_out + count)
    if blocks := arriving.get(load.instance_id):
        load = replace(load, migrating_in=load.migrating_in + len(blocks))
        load = load.after_taking(sum(blocks), len(blocks))
    return load
