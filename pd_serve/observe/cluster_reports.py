"""What instances and scheduler have reported last, beside the loads that decisions are made by."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pd_serve.comm.messages import InstanceStats, LoadReport, SchedulerReport, SchedulerStats
from router.load import InstanceLoad
from router.request import Demand

#: A scheduler that has sent no numbers for so long is not there.
SCHEDULER_LEASE_S = 5.0


class ClusterReports:
    """One API server's latest knowledge of the cluster; `/metrics` is made from it.

    Args:
        loads: Of all instances that have reported.
        waiting: Requests that no instance has yet.
        num_running: Requests of this API server in progress.
        slots: vLLM's number of each live instance.
        clock: Seconds.

    Attributes:
        stats: By instance.
        stranded: Requests that wait on an instance for another one to take them, by instance.
        scheduler_restarts: Schedulers started in the place of a dead one.
        scaled: Instances started and stopped while serving, by action (start, stop) and role.
    """

    def __init__(
        self,
        loads: Callable[[], Iterable[InstanceLoad]],
        waiting: Callable[[], Demand],
        num_running: Callable[[], int],
        slots: Callable[[], dict[str, int]],
        clock: Callable[[], float],
    ) -> None:
        self._loads = loads
        self._waiting = waiting
        self._num_running = num_running
        self._slots = slots
        self._clock = clock
        self.stats: dict[str, InstanceStats] = {}
        self.stranded: dict[str, int] = {}
        self.scheduler_restarts = 0
        self.scaled: dict[tuple[str, str], int] = {}
        self._scheduler: tuple[float, SchedulerStats] | None = None

    def on_load(self, instance_id: str, report: LoadReport) -> None:
        self.stranded[instance_id] = len(report.stranded)
        if report.stats is not None:
            self.stats[instance_id] = report.stats

    def on_scheduler(self, report: SchedulerReport) -> None:
        if report.stats is not None:
            self._scheduler = (self._clock(), report.stats)

    def on_owner(self, state: Mapping[str, Any]) -> None:
        """Takes what the owner of the instances says of itself; see `Fleet.state`."""
        self.scheduler_restarts = state["scheduler"]["restarts"]
        self.scaled = {(row["action"], row["role"]): row["instances"] for row in state["scaled"]}

    def forget(self, instance_id: str) -> None:
        self.stats.pop(instance_id, None)
        self.stranded.pop(instance_id, None)

    @property
    def loads(self) -> Sequence[InstanceLoad]:
        return list(self._loads())

    @property
    def waiting(self) -> Demand:
        return self._waiting()

    @property
    def num_running(self) -> int:
        return self._num_running()

    @property
    def slots(self) -> dict[str, int]:
        return self._slots()

    @property
    def scheduler(self) -> SchedulerStats | None:
        """None while there is no scheduler."""
        if self._scheduler is None or self._clock() - self._scheduler[0] > SCHEDULER_LEASE_S:
            return None
        return self._scheduler[1]
