"""The latest reports of instances, scheduler and manager: the source of the metrics of the cluster."""

from collections.abc import Callable, Mapping
from typing import Any

from pd_serve.comm.messages import InstanceInfo, InstanceStats, LoadReport, SchedulerReport, SchedulerStats
from router.load import InstanceLoad
from router.request import Demand

#: A scheduler that has sent no statistics for this long counts as absent.
SCHEDULER_LEASE_S = 5.0


class ClusterReports:
    """What one API server knows of the cluster.

    Args:
        waiting: Gives the demand of the requests that are bound to no instance yet.
        num_running: Gives the number of requests of this API server in progress.
        clock: Seconds.

    Attributes:
        instances, slots: Live instances and their numbers in vLLM's metrics, by instance id.
        loads, stats: Latest reports, by instance id.
        stranded: Number of requests on an instance that wait for another one to take them, by instance id.
        scheduler_restarts: Schedulers started in place of one that died.
        scaled: Instances started and stopped while serving, by action (start, stop) and role.
    """

    def __init__(
        self, waiting: Callable[[], Demand], num_running: Callable[[], int], clock: Callable[[], float]
    ) -> None:
        self._waiting = waiting
        self._num_running = num_running
        self._clock = clock
        self.instances: dict[str, InstanceInfo] = {}
        self.slots: dict[str, int] = {}
        self.loads: dict[str, InstanceLoad] = {}
        self.stats: dict[str, InstanceStats] = {}
        self.stranded: dict[str, int] = {}
        self.scheduler_restarts = 0
        self.scaled: dict[tuple[str, str], int] = {}
        self._scheduler: tuple[float, SchedulerStats] | None = None

    def joined(self, info: InstanceInfo, slot: int) -> None:
        self.instances[info.instance_id] = info
        self.slots[info.instance_id] = slot

    def left(self, instance_id: str) -> None:
        for by_instance in (self.instances, self.slots, self.loads, self.stats, self.stranded):
            by_instance.pop(instance_id, None)

    def on_load(self, instance_id: str, report: LoadReport) -> None:
        self.loads[instance_id] = report.load
        self.stranded[instance_id] = len(report.stranded)
        if report.stats is not None:
            self.stats[instance_id] = report.stats

    def on_scheduler(self, report: SchedulerReport) -> None:
        if report.stats is not None:
            self._scheduler = (self._clock(), report.stats)

    def on_manager(self, state: Mapping[str, Any]) -> None:
        """Takes what the manager reports; see `InstancePool.state`."""
        self.scheduler_restarts = state["scheduler"]["restarts"]
        self.scaled = {(row["action"], row["role"]): row["instances"] for row in state["scaled"]}

    @property
    def waiting(self) -> Demand:
        return self._waiting()

    @property
    def num_running(self) -> int:
        return self._num_running()

    @property
    def scheduler(self) -> SchedulerStats | None:
        """The latest statistics of the scheduler; None while it is absent."""
        if self._scheduler is None or self._clock() - self._scheduler[0] > SCHEDULER_LEASE_S:
            return None
        return self._scheduler[1]
