"""Which instance gives a request to which. One policy per file, all of them `ReschedulingPolicy`."""

from router.plugins import PolicyKind
from router.rescheduling.move import MoveOrder, NoMoves, ReschedulingPolicy
from router.rescheduling.pairing import Pairs

__all__ = ["RESCHEDULING", "MoveOrder", "ReschedulingPolicy"]

RESCHEDULING: PolicyKind[ReschedulingPolicy] = PolicyKind(
    "rescheduling", "moves", {"none": NoMoves, "pairs": Pairs}
)
