"""One run of a schedule: the cluster, its clients, the faults, and all checks."""

import asyncio
import gc
import random
import time
import zlib
from dataclasses import dataclass, field
from typing import Any

from pd_serve.comm.timing import RECOVERY_S
from pd_serve.errors import EngineDeadError
from pd_serve.simulation.faults.actors import SimulatedActor
from pd_serve.simulation.faults.clients import Clients, ClientStream
from pd_serve.simulation.faults.cluster import FaultyCluster
from pd_serve.simulation.faults.effects import Effects
from pd_serve.simulation.faults.injector import Injector
from pd_serve.simulation.faults.logs import RunLog
from pd_serve.simulation.faults.operations import OperatorCalls
from pd_serve.simulation.faults.process_loop import ProcessLoop, wall_clock
from pd_serve.simulation.faults.rest import RestChecks
from pd_serve.simulation.faults.schedule import Schedule
from pd_serve.simulation.faults.targets import TargetFinder

#: Time from the last fault until everything has to be at rest, in seconds: requests have ended, pools have
#: their sizes. A start waits up to 2 minutes after failed ones, and a lost peer is noticed after 30 s.
REST_BOUND_S = 300.0

#: The cluster has to stay at rest for this time after the last fault, which leases would end.
QUIET_S = 40.0

#: A cluster that is not ready then has failed.
START_BOUND_S = 120.0

#: Maximum number of findings of one run; more say nothing new.
MAX_FINDINGS = 20


@dataclass
class RunResult:
    """The result of one run.

    Attributes:
        findings: What should not have happened; empty if nothing was found.
        trace: Lines of the trace, if it was kept.
        digest: A number that is equal for equal runs.
        streams, tokens, deaths: What the run consisted of.
        recoveries: Recomputed requests by reason, and reconciliations by kind.
        simulated_s, cpu_s: Durations.
    """

    findings: list[str] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    digest: int = 0
    streams: int = 0
    tokens: int = 0
    deaths: int = 0
    recoveries: dict[str, int] = field(default_factory=dict)
    simulated_s: float = 0.0
    cpu_s: float = 0.0


def run(schedule: Schedule, *, trace: bool = False) -> RunResult:
    """Runs a schedule in virtual time. Deterministic except for `cpu_s`."""
    began = time.process_time()
    collects = gc.isenabled()
    gc.disable()
    loop = ProcessLoop()
    asyncio.set_event_loop(loop)
    try:
        with wall_clock(loop):
            result = loop.run_until_complete(_run(schedule, loop, trace))
    finally:
        asyncio.set_event_loop(None)
        loop.drop()
        if collects:
            gc.enable()
    result.cpu_s = time.process_time() - began
    return result


async def _run(schedule: Schedule, loop: ProcessLoop, trace: bool) -> RunResult:
    return await FaultRun(schedule, loop, trace=trace).run()


class FaultRun:
    """One run."""

    def __init__(self, schedule: Schedule, loop: ProcessLoop, *, trace: bool) -> None:
        self._schedule = schedule
        self._loop = loop
        self._result = RunResult()
        self._log = RunLog(loop, self._on_error, keep=trace)
        self._errors: list[str] = []
        name = f"{schedule.tier}/{schedule.seed}"
        self.cluster = FaultyCluster(loop, schedule.shape, random.Random(f"{name}/cluster"), self._deliver)
        platform = self.cluster.platform
        self.clients = Clients(
            schedule.requests,
            self.cluster.engine.block_tokens,
            lambda: list(self.cluster.api_servers),
            self._find,
            loop,
            sampled=schedule.shape.sampled,
            comes_back=schedule.shape.comes_back,
        )
        self.operations = OperatorCalls(self.cluster, self.clients, self._find, self._log.note)
        targets = TargetFinder(self.cluster, self.clients)
        self.effects = Effects(
            self.cluster,
            self.clients,
            targets,
            self.operations,
            schedule.shape.resume_order,
            random.Random(f"{name}/effects"),
        )
        self._checks = RestChecks(self.cluster, self.clients, self.operations)
        self.injector = Injector(schedule, loop, self.effects, self._log.note)
        self.cluster.network.on_send = self.injector.on_send
        self.cluster.on_failure = self._on_failure
        platform.on_failure = self._on_failure
        platform.on_stop = self._on_stop
        platform.on_death = self._on_death
        loop.set_exception_handler(self._on_exception)

    async def run(self) -> RunResult:
        with self._log:
            try:
                async with asyncio.timeout(START_BOUND_S):
                    await self.cluster.start()
            except TimeoutError:
                self._find("the cluster does not start")
                return self._result
            zero = self._loop.now
            self._checks.count_tasks()
            self._log.note("the cluster is ready")
            self.clients.open(zero)
            self.injector.open()
            await self._until_at_rest()
            self._check_errors()
            self._check_flips()
        self._result.trace = self._log.lines
        self._result.simulated_s = self._loop.now - zero
        self._result.streams = len(self.clients.streams)
        resumed = {"resumed": self.clients.num_resumed} if self.clients.num_resumed else {}
        self._result.recoveries = dict(self.cluster.recoveries) | resumed
        streams = self.clients.streams.values()
        self._result.tokens = sum(len(stream.tokens) for stream in streams)
        ends = [(s.request_id, s.outcome, tuple(s.tokens)) for s in streams]
        self._result.digest = zlib.crc32(repr((self._result.findings, self._loop.now, ends)).encode())
        return self._result

    async def _until_at_rest(self) -> None:
        last_s = max(self._schedule.last_fault_s, *(r.arrival_s for r in self._schedule.requests))
        began = self._loop.now
        await asyncio.sleep(last_s + QUIET_S)
        while True:
            problems = self.cluster.network.problems() if self.injector.is_done else ["faults go on"]
            problems = problems or self._checks.problems()
            if not problems:
                return
            starts_s = self.cluster.platform.starts.ended_at
            if self._loop.now > max(self.injector.ended_at, began + last_s, starts_s) + REST_BOUND_S:
                break
            await asyncio.sleep(5.0)
        for problem in problems:
            self._find(problem)

    # ---- findings

    def _find(self, text: str) -> None:
        self._log.note(f"FINDING  {text}")
        if text not in self._result.findings and len(self._result.findings) < MAX_FINDINGS:
            self._result.findings.append(text)

    def _deliver(self, batch: Any) -> None:
        self.clients.on_batch(batch)

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._find(f"unhandled: {context.get('exception') or context['message']!r}")

    def _on_failure(self, what: str, error: BaseException) -> None:
        if isinstance(error, EngineDeadError) and self.cluster.is_left(what):
            return  # it ends itself after a time
        self._find(f"{what} has ended because of a failure: {error!r}")

    def _on_death(self, name: str) -> None:
        self._result.deaths += 1
        self._log.note(f"{name} is dead")

    def _on_stop(self, name: str, actor: SimulatedActor) -> None:
        """A manager ends an instance: it has to be empty, or was silent for the time of a lease."""
        self._log.note(f"{name} is stopped")
        instance = actor.instance
        assert instance is not None
        if name in self.effects.excused:
            self._result.deaths += 1
            return
        was_member = instance.llumlet._members.latest is not None  # if not, its start is given up
        if was_member and not instance.llumlet.reporter.draining:
            self._find(f"{name} was ended, though it was healthy")
        elif instance.engine.sequences:
            self._find(f"{name} was stopped with the requests {sorted(instance.engine.sequences)}")

    def _on_error(self, text: str) -> None:
        self._errors.append(text)

    def _check_errors(self) -> None:
        """No request fails, and nothing logs an error, without a fault that explains it."""
        poisoned = self.cluster.platform.poison
        for stream in self.clients.failed:
            if stream.number not in poisoned and not self._is_excused(stream):
                self._find(f"request {stream.request_id} has failed after {len(stream.tokens)} tokens")
        explained = [f"request {stream.request_id}: " for stream in self.clients.failed]
        explained += [f"request {number}." for number in poisoned]  # also if its client has left meanwhile
        for text in self._errors:
            if not any(text.startswith(of) for of in explained):
                self._find(f"logged: {text}")
        for server in self.cluster.api_servers:
            for problem in server.wire.failures.problems():
                self._find(problem)

    def _is_excused(self, stream: ClientStream) -> bool:
        """A request is given up when more than three of its instances have died, or none comes for a time."""
        return self._result.deaths > 3 or self.cluster.platform.bare_s > RECOVERY_S

    def _check_flips(self) -> None:
        """A flipped bit shows in the tokens: otherwise the comparison of tokens shows nothing."""
        for request_id, computed_anew in self.effects.flips:
            stream = self.clients.streams[request_id]  # a client that came back may read another copy
            undisturbed = computed_anew == self.effects.num_computed_anew() and not self._result.deaths
            if stream.outcome == "length" and stream.number not in self.clients.wrong and undisturbed:
                self._find(f"a flipped bit does not show in the tokens of request {stream.request_id}")
