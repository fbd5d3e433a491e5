"""How many instances a pool has. One signal per kind of pool, and one scaler that acts on it."""

from router.scaling.decisions import Decision, Drain, PoolBounds, Start, Stop
from router.scaling.pool import PoolScaler

__all__ = ["Decision", "Drain", "PoolBounds", "PoolScaler", "Start", "Stop"]
