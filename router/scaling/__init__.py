"""The size of each pool: one signal per kind of pool, and a scaler that acts on it."""

from router.scaling.decisions import Decision, Drain, PoolBounds, SizeChange, Start, Stop
from router.scaling.pool import SCALING, PoolScaler
from router.scaling.signals import to_hand_off

__all__ = [
    "SCALING",
    "Decision",
    "Drain",
    "PoolBounds",
    "PoolScaler",
    "SizeChange",
    "Start",
    "Stop",
    "to_hand_off",
]
