"""Watches a service during the faults: `GET /cluster`, and which of its processes end."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loadtests.answer import StreamError
from loadtests.processes import ProcessKind, ServiceProcesses
from loadtests.report.cluster_samples import ClusterSample
from loadtests.stream_client import AsyncStreamClient

SAMPLE_S = 1.0

#: Interval at which ended processes are looked for.
POLL_S = 0.5

#: A frozen API server answers later.
SAMPLE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Death:
    """A process of the service that ended, in seconds since the load began."""

    at_s: float
    kind: ProcessKind
    pid: int


class ServiceMonitor:
    """Samples of a service.

    Args:
        now_s: Seconds since the load began.
    """

    def __init__(
        self, client: AsyncStreamClient, processes: ServiceProcesses, now_s: Callable[[], float]
    ) -> None:
        self._client = client
        self._processes = processes
        self._now_s = now_s
        self._known: dict[int, ProcessKind] = {}
        self.samples: list[ClusterSample] = []
        self.deaths: list[Death] = []

    @property
    def cluster(self) -> dict[str, Any]:
        """The last body of `GET /cluster`; empty before the first."""
        return self.samples[-1].cluster if self.samples else {}

    async def sample(self) -> None:
        """Samples the cluster until it is cancelled."""
        while True:
            began = time.perf_counter()
            with suppress(StreamError):
                cluster = await self._client.json("/cluster", timeout_s=SAMPLE_TIMEOUT_S)
                self.samples.append(ClusterSample(self._now_s(), cluster))
            await asyncio.sleep(max(0.1, began + SAMPLE_S - time.perf_counter()))

    async def watch_processes(self) -> None:
        """Notes ended processes until it is cancelled."""
        while True:
            found = {process.pid: kind for process, kind in self._processes.kinds()}
            for pid, kind in found.items():
                if kind is ProcessKind.OTHER and pid in self._known:
                    found[pid] = self._known[pid]  # it ends, and has no command line any more
            for pid in self._known.keys() - found.keys():
                self.deaths.append(Death(self._now_s(), self._known[pid], pid))
            self._known = found
            await asyncio.sleep(POLL_S)
