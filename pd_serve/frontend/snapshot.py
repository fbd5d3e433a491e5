"""An instance as `GET /cluster` shows it."""

from typing import Any

from pd_serve.comm.messages import InstanceInfo
from router.freeness import freeness
from router.load import InstanceLoad


def instance_row(info: InstanceInfo, load: InstanceLoad | None) -> dict[str, Any]:
    """Args: `load` is its last report; None before the first one."""
    return {
        "id": info.instance_id,
        "role": load.role if load else info.role,
        "state": "starting" if load is None else "draining" if load.draining else "ready",
        "draining": bool(load and load.draining),
        "node": info.node,
        "pid": info.pid,
        "total_blocks": load.total_blocks if load else 0,
        "free_blocks": load.free_blocks if load else 0,
        "running": load.running if load else 0,
        "waiting": load.waiting if load else 0,
        "freeness": freeness(load) if load else 0.0,
        "migrating_in": load.migrating_in if load else 0,
        "migrating_out": load.migrating_out if load else 0,
    }
