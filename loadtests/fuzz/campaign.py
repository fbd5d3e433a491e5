"""One run: a cluster, frames to all its ports while it serves, and what is left of it afterwards."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from loadtests.checked_load import CheckedLoad
from loadtests.cluster_run import ClusterRun
from loadtests.fuzz.frames import FrameMaker
from loadtests.fuzz.ports import ListeningPort, Protocol, listening_ports
from loadtests.fuzz.recording import record_handshakes
from loadtests.fuzz.sender import SHARES, FrameSender
from loadtests.growth import GrowthLimits, UsageByProcess, ended, grown
from loadtests.servers import MODEL
from loadtests.started_service import StartedService
from loadtests.stream_client import AsyncStreamClient
from loadtests.terminal import say
from pd_serve.comm.wire import CurveKeys

#: Concurrent connections.
CONCURRENCY = 48

#: Frames before usage is measured for the first time: caches fill up, and each address is logged once.
WARM_UP_FRAMES = 10_000

#: Time for what is left of the last connections to go away.
SETTLE_S = 90.0

PROGRESS_S = 10.0

#: A longer log is a finding: frames of strangers must not fill the disk.
MOST_LOG_BYTES_PER_FRAME = 20.0

#: Streams that are served, and checked, meanwhile.
STREAMS, REFERENCES = 2, 6

MOST_FINDINGS = 20


@dataclass(kw_only=True)
class FuzzCampaign(ClusterRun):
    """One run.

    Attributes:
        frames: Number of frames.
        secret: Cluster secret of the service that is started.
    """

    frames: int
    secret: str

    async def on_service(self, service: StartedService, client: AsyncStreamClient) -> None:
        load = CheckedLoad(client, self.seed, STREAMS, REFERENCES)
        try:
            await self._send_frames(service, client, load)
        finally:
            await load.close()

    def summary(self) -> list[str]:
        if self.problems:
            return []
        total = sum(self.numbers["frames"].values())
        return [f"{total:,} frames in {self.numbers['seconds']:.0f} s: no crash, no answer, no growth"]

    async def _send_frames(
        self, service: StartedService, client: AsyncStreamClient, load: CheckedLoad
    ) -> None:
        await load.take_references()  # after this, every socket that there will be is there
        ports = listening_ports(service.processes)
        by_protocol = Counter(port.protocol for port in ports)
        say("listening ports: " + ", ".join(f"{count} {name}" for name, count in by_protocol.items()))
        zmtp = [port.number for port in ports if port.protocol is Protocol.ZMTP]
        recorded = await record_handshakes(zmtp, CurveKeys.derive(self.secret.encode()))
        say(f"recorded {len(recorded)} handshakes of a peer with the cluster's key")
        maker = FrameMaker(self.seed, self.key, MODEL, recorded)
        sender = FrameSender(maker, self.key, random.Random(f"ports {self.seed}"))
        load.start()
        showing = asyncio.create_task(self._show_progress(sender, load))
        began = time.perf_counter()
        try:
            await self._send(sender, ports, min(WARM_UP_FRAMES, self.frames // 4))
            before = await asyncio.to_thread(service.processes.usage)
            await self._send(sender, ports, self.frames)
        finally:
            showing.cancel()
        seconds = time.perf_counter() - began
        if left := await load.stop(120.0):
            self.problems.append(f"{left} streams did not end")
        after = await self._settled(service, before)
        self._judge(sender, load, before, after)
        await self.check_integrity(client)
        self.numbers |= {
            "frames": dict(sender.frames),
            "conversations_answered": dict(sender.answered),
            "ports": [str(port) for port in ports],
            "seconds": round(seconds, 1),
            "streams": len(load.records),
            "usage": [
                {"kind": kind, "pid": pid, "before": _as_row(was), "after": _as_row(after[pid][1])}
                for pid, (kind, was) in before.items()
                if pid in after
            ],
        }

    async def _send(self, sender: FrameSender, ports: list[ListeningPort], until: int) -> None:
        weights = [SHARES[p.protocol] / sum(q.protocol is p.protocol for q in ports) for p in ports]

        async def worker() -> None:
            while sender.frames.total() < until and len(sender.findings) < MOST_FINDINGS:
                (port,) = sender.dice.choices(ports, weights)
                await sender.converse(port)

        await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))

    async def _settled(self, service: StartedService, before: UsageByProcess) -> UsageByProcess:
        """What the processes use at the end, as soon as nothing has grown or after `SETTLE_S`."""
        deadline = time.perf_counter() + SETTLE_S
        while True:
            after = await asyncio.to_thread(service.processes.usage)
            if not grown(before, after, GrowthLimits()) or time.perf_counter() > deadline:
                return after
            await asyncio.sleep(3.0)

    def _judge(
        self, sender: FrameSender, load: CheckedLoad, before: UsageByProcess, after: UsageByProcess
    ) -> None:
        self.problems += sender.findings[:MOST_FINDINGS]
        for port, count in sender.unreachable.items():
            if port.is_of_the_service:
                self.problems.append(f"{count} refused connections: {port}")
        self.problems += ended(before, after) + grown(before, after, GrowthLimits())
        self.check_streams(load)
        log = self.out / "server.log"
        text = log.read_text(errors="replace")
        if tracebacks := text.count("Traceback (most recent call last)"):
            self.problems.append(f"{tracebacks} tracebacks in {log}")
        if log.stat().st_size > 1e6 + MOST_LOG_BYTES_PER_FRAME * sender.frames.total():
            self.problems.append(f"{log} grew to {log.stat().st_size / 1e6:.0f} MB")

    async def _show_progress(self, sender: FrameSender, load: CheckedLoad) -> None:
        while True:
            began, was = time.perf_counter(), sender.frames.total()
            await asyncio.sleep(PROGRESS_S)
            count = sender.frames.total()
            rate = (count - was) / (time.perf_counter() - began)
            say(
                f"{load.now_s:5.0f} s  {count:,} of {self.frames:,} frames, {rate:,.0f}/s, "
                f"{len(sender.findings)} findings, {len(load.records)} streams, {len(load.failed())} failed"
            )


def _as_row(usage: Any) -> dict[str, float]:
    return {
        "memory_mib": round(usage.memory_mib, 1),
        "descriptors": usage.descriptors,
        "threads": usage.threads,
    }
