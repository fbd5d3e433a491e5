"""Who moves a request to whom. One policy per file, all of the type `Rescheduling`."""

from router.policies import ReschedulingName
from router.rescheduling import guarded, paper
from router.rescheduling.base import Move, Rescheduling

__all__ = ["RESCHEDULING", "Move", "Rescheduling"]

RESCHEDULING: dict[ReschedulingName, Rescheduling] = {
    "none": lambda loads, policies: [],
    "paper": paper.moves,
    "guarded": guarded.moves,
}
