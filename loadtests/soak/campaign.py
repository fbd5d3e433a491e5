"""One run: a cluster under a mixed load, or under overload; then the cluster at rest."""

import asyncio
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.answer import StreamError
from loadtests.checked_load import CheckedLoad
from loadtests.cluster_at_rest import not_at_rest
from loadtests.growth import GrowthLimits
from loadtests.processes import ProcessKind
from loadtests.soak.overload import Overload
from loadtests.soak.usage_series import UsageSeries
from loadtests.soak.variants import VariantLoad
from loadtests.started_service import ClusterShape, StartedService, started_service
from loadtests.stream_client import AsyncStreamClient
from loadtests.terminal import say
from pd_serve.launch.signals import end_on

#: Samples of the usage in a run, with a shortest interval.
SAMPLES, SHORTEST_INTERVAL_S = 200, 2.0

PROGRESS_S = 15.0

#: Bounds: the last streams end; nothing is held any more.
LAST_STREAMS_S, REST_S = 240.0, 60.0

#: Different requests of the checked streams.
REFERENCES = 40


@dataclass
class SoakCampaign:
    """One run.

    Attributes:
        duration_s: Of the mixed load.
        streams: Concurrent checked streams.
        overload: Overload in the place of the mixed load.
        problems: Reasons why the run failed.
        numbers: What was sent and measured, for the report.
    """

    shape: ClusterShape
    duration_s: float
    seed: int
    streams: int
    overload: bool
    out: Path
    problems: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    async def run(self) -> None:
        """Returns after all started processes have ended.

        Raises:
            PdServeError: The service did not start.
            StreamError: It did not serve at the beginning.
        """
        end_on(signal.SIGINT, signal.SIGTERM)
        say(f"starting a cluster; its output: {self.out / 'server.log'}")
        async with started_service(self.shape, self.out) as service:
            say(service.command)
            async with AsyncStreamClient(service.url) as client:
                interval_s = max(SHORTEST_INTERVAL_S, self.duration_s / SAMPLES)
                usage = UsageSeries(service.processes, interval_s)
                if self.overload:
                    await self._overload(service, client, usage)
                else:
                    await self._mixed_load(client, usage)
                await self._check_at_rest(client)
                self.numbers["usage"] = usage.table()

    async def _mixed_load(self, client: AsyncStreamClient, usage: UsageSeries) -> None:
        load = CheckedLoad(client, self.seed, self.streams, REFERENCES)
        variants = VariantLoad(client, self.seed, with_schema=self.shape.engine == "vllm")
        say(f"undisturbed run of {REFERENCES} requests")
        await load.take_references()
        load.start()
        variants.start()
        sampling = asyncio.create_task(usage.sample())
        showing = asyncio.create_task(self._show_progress(load, variants, usage))
        try:
            await asyncio.sleep(self.duration_s)
            await variants.stop()
            if left := await load.stop(LAST_STREAMS_S):
                self.problems.append(f"{left} streams did not end")
        finally:
            for task in (sampling, showing):
                task.cancel()
            await asyncio.gather(sampling, showing, return_exceptions=True)
            await variants.stop()
            await load.close()
        self.problems += [f"{count} x {kind}" for kind, count in variants.failures.items()]
        for kind, count in Counter(one.outcome.error for one in load.failed()).items():
            self.problems.append(f"{count} of {len(load.records)} streams: {kind}")
        self.problems += usage.problems(GrowthLimits())
        self.numbers |= {
            "duration_s": self.duration_s,
            "streams": len(load.records),
            "tokens": sum(one.outcome.tokens for one in load.records),
            "refusals": sum(one.refusals for one in load.records),
            "variants": dict(variants.sent),
        }

    async def _overload(self, service: StartedService, client: AsyncStreamClient, usage: UsageSeries) -> None:
        sampling = asyncio.create_task(usage.sample())
        overload = Overload(client, service.url, self.seed)
        try:
            await overload.run()
        finally:
            sampling.cancel()
            await asyncio.gather(sampling, return_exceptions=True)
        self.problems += list(dict.fromkeys(overload.problems))
        self.numbers["cases"] = overload.numbers

    async def _check_at_rest(self, client: AsyncStreamClient) -> None:
        """Every block is back, no instance has a request, and `GET /cluster/integrity` finds nothing."""
        deadline, problems = time.perf_counter() + REST_S, ["GET /cluster failed"]
        while problems and time.perf_counter() < deadline:
            await asyncio.sleep(1.0)
            with suppress(StreamError):
                problems = not_at_rest(await client.json("/cluster"))
        with suppress(StreamError):
            violations = (await client.json("/cluster/integrity"))["violations"]
            self.problems += [*problems, *(f"integrity: {violation}" for violation in violations)]
            return
        self.problems += [*problems, "GET /cluster/integrity failed"]

    async def _show_progress(self, load: CheckedLoad, variants: VariantLoad, usage: UsageSeries) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            memory: Counter[ProcessKind] = Counter()
            for kind, one in usage.samples[-1][1].values() if usage.samples else ():
                memory[kind] += round(one.memory_mib)
            failed = len(load.failed()) + variants.failures.total()
            shown = ", ".join(f"{kind} {mib} MiB" for kind, mib in sorted(memory.items()))
            say(
                f"{load.now_s:5.0f} s of {self.duration_s:.0f}  {len(load.records)} streams, "
                f"{variants.sent.total()} others, {failed} failed; {shown}"
            )
