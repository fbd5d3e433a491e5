"""One run: a cluster under a mixed load, or under overload; then the cluster at rest."""

import asyncio
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

from loadtests.answer import StreamError
from loadtests.checked_load import CheckedLoad
from loadtests.cluster_at_rest import not_at_rest
from loadtests.cluster_run import ClusterRun
from loadtests.growth import GrowthLimits
from loadtests.processes import ProcessKind
from loadtests.soak.overload import Overload
from loadtests.soak.usage_series import UsageSeries
from loadtests.soak.variants import VariantLoad
from loadtests.started_service import StartedService
from loadtests.stream_client import AsyncStreamClient
from loadtests.terminal import say

#: Samples of the usage in a run, with a shortest interval.
SAMPLES, SHORTEST_INTERVAL_S = 200, 2.0

PROGRESS_S = 15.0

#: Bounds: the last streams end; nothing is held any more.
LAST_STREAMS_S, REST_S = 240.0, 60.0

#: Different requests of the checked streams.
REFERENCES = 40


@dataclass(kw_only=True)
class SoakCampaign(ClusterRun):
    """One run.

    Attributes:
        duration_s: Of the mixed load.
        streams: Concurrent checked streams.
        overload: Overload in the place of the mixed load.
    """

    duration_s: float
    streams: int
    overload: bool

    async def on_service(self, service: StartedService, client: AsyncStreamClient) -> None:
        usage = UsageSeries(service.processes, max(SHORTEST_INTERVAL_S, self.duration_s / SAMPLES))
        if self.overload:
            await self._overload(service, client, usage)
        else:
            await self._mixed_load(client, usage)
        await self._check_at_rest(client)
        self.numbers["usage"] = usage.table()

    def summary(self) -> list[str]:
        lines = [
            f"{row['kind']:>10} (pid {row['pid']}): memory {row['memory_mib']} MiB, "
            f"descriptors {row['descriptors']}, threads {row['threads']}"
            for row in self.numbers.get("usage", ())
            if row["kind"] != "other"
        ]
        return lines if self.problems else [*lines, "nothing failed, nothing grew, nothing was left"]

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
        self.check_streams(load)
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
        self.problems += problems
        await self.check_integrity(client)

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
