"""Rows of instances in `GET /cluster`."""

from typing import Any

from pd_serve.comm.cluster_state import StartingInstance
from pd_serve.comm.membership import InstanceInfo
from router.freeness import freeness
from router.load import InstanceLoad


def instance_row(info: InstanceInfo, load: InstanceLoad | None) -> dict[str, Any]:
    """The row of a started instance; `load` is None before its first report."""
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


def starting_row(starting: StartingInstance) -> dict[str, Any]:
    """The row of an instance that does not serve yet."""
    counts = ("total_blocks", "free_blocks", "running", "waiting", "migrating_in", "migrating_out")
    row = {"id": starting.id, "role": starting.role, "state": starting.state}
    return row | {"draining": False, "node": "", "pid": 0, "freeness": 0.0} | dict.fromkeys(counts, 0)
