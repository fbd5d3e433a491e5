"""The instances that are kept nearly empty for requests of high priority."""

from collections.abc import Iterable

from msgspec.structs import replace

from router.load import InstanceLoad


def limit_headroom(loads: Iterable[InstanceLoad], share: float) -> list[InstanceLoad]:
    """The loads, with headroom on at most this share of each pool, and on at least one instance if it is > 0.

    The instances with the most requests of high priority keep headroom; the others count as if they had none.
    Without a limit a tenth of long requests claims a whole pool: each instance is then too full for requests
    of normal priority and has to give its own away (docs/policies.md). The paper has no limit: 1.
    """
    loads = list(loads)
    claiming = [load for load in loads if load.high_priority]
    if share >= 1.0 or not claiming:
        return loads
    kept: set[str] = set()
    for role in dict.fromkeys(load.role for load in claiming):
        most = max(1, int(sum(load.role == role for load in loads) * share)) if share > 0 else 0
        pool = [load for load in claiming if load.role == role]
        pool.sort(key=lambda load: (-load.high_priority, load.instance_id))
        kept.update(load.instance_id for load in pool[:most])
    return [
        replace(load, high_priority=0) if load.high_priority and load.instance_id not in kept else load
        for load in loads
    ]
