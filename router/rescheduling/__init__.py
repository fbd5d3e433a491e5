"""Who moves a request to whom. One policy per file, all of the type `Rescheduling`."""

from router.policies import ReschedulingName
from router.rescheduling import pairing as pairs
from router.rescheduling.move import Move, Rescheduling

__all__ = ["RESCHEDULING", "Move", "Rescheduling"]

RESCHEDULING: dict[ReschedulingName, Rescheduling] = {
    "none": lambda loads, policies: [],
    "pairs": pairs.moves,
}
