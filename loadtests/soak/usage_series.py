"""What the processes of a service use over time, and whether it stays flat."""

import asyncio
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from loadtests.growth import GrowthLimits, UsageByProcess, grown
from loadtests.processes import ProcessKind, ServiceProcesses, Usage

#: Share of the run that is warm-up: caches and pools fill.
WARM_UP = 0.25


@dataclass(slots=True)
class UsageSeries:
    """Samples of all processes.

    Attributes:
        samples: (seconds since the first, what each process uses).
    """

    processes: ServiceProcesses
    interval_s: float
    samples: list[tuple[float, UsageByProcess]] = field(default_factory=list)

    async def sample(self) -> None:
        """Samples until it is cancelled."""
        began = time.monotonic()
        while True:
            usage = await asyncio.to_thread(self.processes.usage)
            self.samples.append((time.monotonic() - began, usage))
            await asyncio.sleep(self.interval_s)

    def begin_and_end(self) -> tuple[UsageByProcess, UsageByProcess]:
        """Medians over the first and the last third of the time after the warm-up."""
        after = self.samples[int(len(self.samples) * WARM_UP) :]
        third = max(1, len(after) // 3)
        return _medians([one for _, one in after[:third]]), _medians([one for _, one in after[-third:]])

    def problems(self, limits: GrowthLimits) -> list[str]:
        """What has grown."""
        return grown(*self.begin_and_end(), limits)

    def table(self) -> list[dict[str, Any]]:
        """A row for each process: kind, and its memory, descriptors and threads at begin and end."""
        begin, end = self.begin_and_end()
        return [
            {
                "kind": str(kind),
                "pid": pid,
                "memory_mib": (round(was.memory_mib, 1), round(end[pid][1].memory_mib, 1)),
                "descriptors": (was.descriptors, end[pid][1].descriptors),
                "threads": (was.threads, end[pid][1].threads),
            }
            for pid, (kind, was) in begin.items()
            if pid in end
        ]


def _medians(samples: list[UsageByProcess]) -> UsageByProcess:
    by_process: dict[int, list[tuple[ProcessKind, Usage]]] = {}
    for sample in samples:
        for pid, one in sample.items():
            by_process.setdefault(pid, []).append(one)
    return {
        pid: (
            found[-1][0],
            Usage(
                statistics.median(usage.memory_mib for _, usage in found),
                round(statistics.median(usage.descriptors for _, usage in found)),
                round(statistics.median(usage.threads for _, usage in found)),
            ),
        )
        for pid, found in by_process.items()
    }
