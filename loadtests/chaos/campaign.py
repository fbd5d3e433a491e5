"""One run: an undisturbed run, the load with the faults, the recovery, and the verdict."""

import asyncio
import signal
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.answer import StreamError
from loadtests.chaos import verdict
from loadtests.chaos.injector import FaultInjector
from loadtests.chaos.monitor import ServiceMonitor
from loadtests.chaos.operations import Operator
from loadtests.chaos.report import ChaosResult
from loadtests.chaos.schedule import Fault
from loadtests.checked_load import CheckedLoad
from loadtests.cluster_at_rest import missing_instances, not_at_rest
from loadtests.started_service import ClusterShape, StartedService, started_service
from loadtests.stream_client import AsyncStreamClient
from loadtests.terminal import say
from pd_serve.launch.signals import end_on

#: Streams before the first fault and after the last one, in seconds.
BEFORE_S, AFTER_S = 5.0, 10.0

#: Bounds after the last fault: pools reach their sizes, and every stream ends.
RECOVERY_S, LAST_STREAMS_S = 300.0, 240.0

#: They end the faults, and then the run.
SIGNALS = (signal.SIGINT, signal.SIGTERM)

#: Interval of progress lines.
PROGRESS_S = 10.0


@dataclass
class ChaosCampaign:
    """One run.

    Attributes:
        faults: Its schedule.
        streams: Concurrent streams.
        references: Number of different requests.
        keep_instances: No instance may end at all; for schedules of freezes shorter than every lease of
            instances.
    """

    shape: ClusterShape
    faults: Sequence[Fault]
    seed: int
    streams: int
    references: int
    out: Path
    keep_instances: bool = False
    problems: list[str] = field(default_factory=list)

    async def run(self) -> ChaosResult:
        """Returns what happened, after all started processes have ended.

        Raises:
            PdServeError: The service did not start.
            StreamError: The undisturbed run failed.
        """
        end_on(*SIGNALS)
        say(f"starting a cluster; its output: {self.out / 'server.log'}")
        async with started_service(self.shape, self.out) as service:
            say(service.command)
            async with AsyncStreamClient(service.url) as client:
                return await self._run(service, client)

    async def _run(self, service: StartedService, client: AsyncStreamClient) -> ChaosResult:
        load = CheckedLoad(client, self.seed, self.streams, self.references)
        monitor = ServiceMonitor(client, service.processes, lambda: load.now_s)
        operator = Operator(client, self.shape.instances)
        injector = FaultInjector(
            service, operator, lambda: monitor.cluster, lambda: list(load.active), lambda: load.now_s
        )
        load.zero = time.perf_counter()
        watchers = [asyncio.create_task(job) for job in (monitor.sample(), monitor.watch_processes())]
        try:
            await self._until_whole(monitor)
            say(f"undisturbed run of {self.references} requests")
            await load.take_references()
            instances = [row["pid"] for row in monitor.cluster["instances"]]
            load.start()
            monitor.samples.clear()
            watchers.append(asyncio.create_task(self._show_progress(load, injector)))
            await asyncio.sleep(BEFORE_S)
            await self._until_interrupted(self._inject(injector, load))
            await injector.finish()
            await asyncio.sleep(AFTER_S)
            if left := await load.stop(LAST_STREAMS_S):
                self.problems.append(f"{left} streams did not end within {LAST_STREAMS_S:.0f} s")
            await self._recover(monitor, operator, client)
            if self.keep_instances and instances != [row["pid"] for row in monitor.cluster["instances"]]:
                self.problems.append("an instance was replaced")
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            await operator.close()
            await load.close()
        verdict.excuse(load.records, monitor.deaths, injector.records)
        self.problems += verdict.problems_of_streams(load.records)
        self.problems += verdict.problems_of_faults(len(self.faults), injector.records)
        self.problems += verdict.unexplained_deaths(monitor.deaths, injector.records)
        return ChaosResult(
            seed=self.seed,
            command=service.command,
            streams=load.records,
            faults=injector.records,
            samples=monitor.samples,
            deaths=monitor.deaths,
            problems=self.problems,
        )

    async def _until_interrupted(self, work: Coroutine[Any, Any, None]) -> None:
        """Ends it at the first SIGINT or SIGTERM; the run is judged all the same. The next ends the run."""
        loop, task = asyncio.get_running_loop(), asyncio.create_task(work)
        for number in SIGNALS:
            loop.add_signal_handler(number, task.cancel)
        try:
            await asyncio.wait([task])
        finally:
            end_on(*SIGNALS)
        if task.cancelled():
            say("interrupted: no further faults; interrupt once more to end at once")
        else:
            task.result()

    async def _inject(self, injector: FaultInjector, load: CheckedLoad) -> None:
        for fault in self.faults:
            await asyncio.sleep(fault.pause_s)
            record = await injector.carry_out(fault)
            say(f"{record.at_s:5.0f} s  fault {fault.number + 1}/{len(self.faults)}: {record}")

    async def _show_progress(self, load: CheckedLoad, injector: FaultInjector) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            tokens = sum(record.outcome.tokens for record in load.records)
            broken = sum(record.broken for record in load.records)
            say(
                f"{load.now_s:5.0f} s  {len(injector.records)}/{len(self.faults)} faults, "
                f"{len(load.active)} streams run, {len(load.records)} ended with {tokens} tokens, "
                f"{len(load.failed()) - broken} wrong or failed, {broken} connections broken"
            )

    async def _until_whole(self, monitor: ServiceMonitor) -> None:
        deadline = time.perf_counter() + RECOVERY_S
        while missing := missing_instances(monitor.cluster, self.shape.instances):
            if time.perf_counter() > deadline:
                raise StreamError("the cluster did not become whole", "; ".join(missing))
            await asyncio.sleep(0.5)

    async def _recover(self, monitor: ServiceMonitor, operator: Operator, client: AsyncStreamClient) -> None:
        """Waits until the cluster is as at the beginning, and checks it at rest."""
        say("waiting until all pools have their sizes again")
        began = time.perf_counter()

        def left() -> list[str]:
            return missing_instances(monitor.cluster, self.shape.instances) + not_at_rest(monitor.cluster)

        while missing := left():
            if time.perf_counter() > began + RECOVERY_S:
                self.problems += [f"after {RECOVERY_S:.0f} s: {problem}" for problem in missing]
                break
            await operator.restore(monitor.cluster)
            await asyncio.sleep(2.0)
        if not missing:
            say(f"whole {time.perf_counter() - began:.0f} s after the last stream")
        await self._check_integrity(client)

    async def _check_integrity(self, client: AsyncStreamClient) -> None:
        violations: list[str] | None = None
        with suppress(StreamError):
            answer: dict[str, Any] = await client.json("/cluster/integrity")
            violations = answer["violations"]
        if violations is None:
            self.problems.append("GET /cluster/integrity failed")
        else:
            self.problems += [f"integrity: {violation}" for violation in violations]
