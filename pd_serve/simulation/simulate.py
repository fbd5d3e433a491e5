"""One run: the clients of a workload in front of a simulated cluster, in virtual time."""

import asyncio
import contextlib
import gc
import math
import operator
import time
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from migration.tasks import BackgroundTasks
from pd_serve.comm.outputs import OutputBatch, RequestOutput
from pd_serve.errors import PdServeError
from pd_serve.simulated_engine.cached_keys import prompt_keys
from pd_serve.simulated_engine.contents import (
    Prompt,
    SegmentPrompt,
    TokenPrompt,
    expected_output,
    text_token,
)
from pd_serve.simulated_engine.outputs import SimulatedOutput, SimulatedPayload
from pd_serve.simulated_engine.settings import SEGMENT_TOKENS
from pd_serve.simulation.config import SimulationConfig
from pd_serve.simulation.result import RequestRecord, Sample, SimulationResult
from pd_serve.simulation.simulated_cluster import SimulatedCluster
from pd_serve.simulation.virtual_time import VirtualLoop
from router.handoff import can_receive
from router.request import NewRequest

SAMPLE_S = 1.0

#: Maximum time until the cluster is at rest after the last token: leases after lost messages have to expire.
REST_S = 30.0

OnProgress = Callable[[int, int], None]


def simulate(config: SimulationConfig, on_progress: OnProgress | None = None) -> SimulationResult:
    """Runs until every request has ended. Deterministic except for `wall_s`.

    Args:
        on_progress: Called with (requests ended, requests) after every few requests.

    Raises:
        ValueError: The policy or one of its settings is unknown.
    """
    # Garbage collection would take a third of the time, and little of the garbage is cyclic.
    gc.collect()
    gc.freeze()
    threshold = gc.get_threshold()
    gc.set_threshold(200_000, 50, 100)
    try:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            kind = RecomputedHandoffs if config.moves == "recompute" else Simulation
            return runner.run(kind(config, on_progress).run())
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()


class Simulation:
    """One run: the clients, which record their tokens, and samples of the cluster.

    Attributes:
        all_ended: Set when every request has ended.
    """

    def __init__(self, config: SimulationConfig, on_progress: OnProgress | None = None) -> None:
        self.config = config
        self.records = [RequestRecord(request) for request in config.requests]
        self.samples: list[Sample] = []
        self.cluster: SimulatedCluster
        self._tokens: dict[int, list[int]] = {}  # of the running requests
        self._texts: dict[int, tuple[int, ...]] = {}  # of sessions: a turn's prompt; with its answer, later
        self._next_turn = {r.turn_of: n for n, r in enumerate(config.requests) if r.turn_of is not None}
        self._left = len(config.requests)
        self._on_progress = on_progress or (lambda done, total: None)
        self.all_ended = asyncio.Event()

    async def run(self) -> SimulationResult:
        began = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self.cluster = cluster = SimulatedCluster(self.config, self._on_batch)
        self._loop.set_exception_handler(self._on_exception)
        await cluster.start()
        self._zero = self._loop.time()
        first = self._zero + self.config.front_end_s
        for number, request in enumerate(self.config.requests):
            if request.turn_of is None:
                self._loop.call_at(first + request.arrival_s, self._submit, number)
        sampling = asyncio.ensure_future(self._sample())
        if self._left:
            await self.all_ended.wait()
        end = self._loop.time()
        instance_s = cluster.launcher.instance_s + sum(
            end - max(i.started_at, self._zero) for i in cluster.launcher.instances.values()
        )
        sampling.cancel()
        leaked, integrity = await self._rest()
        migrations = cluster.frontend.snapshot().migrations
        await cluster.stop()
        return SimulationResult(
            records=self.records,
            samples=self.samples,
            migrations=migrations,
            preemptions=cluster.launcher.preemptions,
            preemption_loss_s=cluster.launcher.preemption_loss_s,
            instance_s=instance_s,
            duration_s=end - self._zero,
            leaked_blocks=leaked,
            integrity=integrity,
            scaling=[(at - self._zero, what) for at, what in cluster.scaling],
            steps=cluster.launcher.steps,
            wall_s=time.perf_counter() - began,
        )

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Adds an unhandled exception to the violated invariants of the run; logs each kind once."""
        failure = repr(context.get("exception") or context["message"])
        if failure not in self.cluster.launcher.failures:
            self.cluster.launcher.failures.append(failure)
            loop.default_exception_handler(context)

    # ---- clients

    def _submit(self, number: int) -> None:
        request = self.records[number].request
        slo = self.config.slo
        new = NewRequest(request.prompt_tokens, request.priority, slo=slo, arrives_later_s=-slo.lead_s)
        requests = self.cluster.frontend.requests
        if slo.ttft_s < math.inf and (requests.first_token_s(new, 0) or 0.0) > slo.ttft_s:
            self.records[number].refused = True
            return self._end(number)
        payload = SimulatedPayload(
            request_id=str(number),
            prompt_tokens=request.prompt_tokens,
            max_tokens=request.output_tokens,
            priority=request.priority,
            arrival_s=request.arrival_s + new.arrives_later_s,
            segments=request.segments,
            seed=number,
            token_ids=self._session_prompt(number),
        )
        keys = self._prefix_keys(payload) if request.segments or payload.token_ids else ()
        self._tokens[number] = []
        try:
            requests.submit(payload.request_id, payload.encode(), replace(new, prefix_keys=keys))
        except PdServeError:
            self.records[number].failed = True
            self._end(number)

    def _session_prompt(self, number: int) -> tuple[int, ...]:
        """The tokens of a session's turn; empty for a request that is not of a session."""
        request = self.config.requests[number]
        if request.turn_of is None and number not in self._next_turn:
            return ()
        before = request.turn_of
        known = () if before is None else self._texts.pop(before)
        new = (text_token(number, position) for position in range(len(known), request.prompt_tokens))
        self._texts[number] = (*known, *new)
        return self._texts[number]

    def _start_turn(self, number: int) -> None:
        record = self.records[number]
        now = self._loop.time() - self._zero
        record.request = replace(record.request, arrival_s=now)
        self._loop.call_later(self.config.front_end_s, self._submit, number)

    def _prefix_keys(self, payload: SimulatedPayload) -> tuple[int, ...]:
        """The keys of the shared part of a prompt, if a policy needs them."""
        wanted = self.cluster.frontend.instances.cached_blocks.format
        if wanted is None:
            return ()
        named = payload.prompt_tokens if payload.token_ids else len(payload.segments) * SEGMENT_TOKENS
        shared = min(payload.prompt_tokens, named)
        return tuple(prompt_keys(payload.prompt, wanted.key_tokens, shared))

    def _on_batch(self, batch: OutputBatch) -> None:
        now = self._loop.time()
        for output in batch.outputs:
            number = int(output.request_id)
            if new := output.new_token_ids:
                self._take(number, new)
                self._on_tokens(number, self._delivered(output, now))
            if output.finish_reason is not None:
                self.records[number].failed = output.finish_reason == "error"
                self._end(number)

    def _take(self, number: int, new: list[int]) -> None:
        if (tokens := self._tokens.get(number)) is None:
            self.records[number].duplicated += len(new)  # it has ended
        else:
            tokens += new

    def _delivered(self, output: RequestOutput, now: float) -> list[float]:
        """When each new token of an output has come."""
        assert isinstance(output, SimulatedOutput)
        tokens, known = len(output.new_token_ids), output.delivered or []
        times = [*known, *[now] * (tokens - len(known))][-tokens:]
        return [at - self._zero for at in times]

    def _on_tokens(self, number: int, times: list[float]) -> None:
        """A request has got tokens, at these times."""
        record = self.records[number]
        if not record.tokens:
            record.first_token_s = record.last_token_s = times[0]
        record.tokens += len(times)
        for at in times:
            if at - record.last_token_s > record.longest_gap_s:
                record.longest_gap_s = at - record.last_token_s
            record.last_token_s = at

    def _end(self, number: int) -> None:
        """A request has ended. The next turn of its session follows, or fails with it."""
        self._check(number)
        if (turn := self._next_turn.get(number)) is not None:
            record = self.records[number]
            if record.failed or record.refused:
                self.records[turn].failed, self.records[turn].refused = record.failed, record.refused
                self._end(turn)
            else:
                self._loop.call_later(self.config.requests[turn].arrival_s, self._start_turn, turn)
        self._left -= 1
        done = len(self.records) - self._left
        if done % 64 == 0 or not self._left:
            self._on_progress(done, len(self.records))
        if not self._left:
            self.all_ended.set()

    def _check(self, number: int) -> None:
        """Compares the tokens of a client with the output that its prompt determines."""
        record, tokens = self.records[number], self._tokens.pop(number, [])
        text = self._texts.pop(number, None)
        if record.failed or record.refused:
            return
        request = record.request
        prompt: Prompt = SegmentPrompt(request.prompt_tokens, request.segments, SEGMENT_TOKENS, number)
        if text is not None:
            prompt = TokenPrompt(text)
            if number in self._next_turn:
                self._texts[number] = (*text, *tokens)
        block_tokens = self.config.engines["neutral"].block_tokens
        expected = expected_output(prompt, request.output_tokens, block_tokens)
        record.lost = max(0, len(expected) - len(tokens))
        record.duplicated = max(0, len(tokens) - len(expected))
        record.wrong = sum(map(operator.ne, tokens, expected))

    # ---- the cluster

    async def _sample(self) -> None:
        while True:
            engines = [instance.engine.load() for instance in self.cluster.launcher.instances.values()]
            self.samples.append(
                Sample(
                    at_s=self._loop.time() - self._zero,
                    instances=len(engines),
                    running=sum(load.running for load in engines),
                    waiting=sum(load.waiting for load in engines),
                    free=sum(load.free_blocks for load in engines),
                    total=sum(load.total_blocks for load in engines),
                    head_of_line=[load.head_of_line_blocks for load in engines if load.waiting],
                )
            )
            await asyncio.sleep(SAMPLE_S)

    async def _rest(self) -> tuple[int, list[str]]:
        """Waits until nothing is in progress.

        Returns:
            Number of KV blocks that are not free then, and the violated invariants.
        """
        deadline = self._loop.time() + REST_S
        while True:
            leaked = self.cluster.num_leaked_blocks
            integrity = await self.cluster.check_integrity()
            if (not leaked and not integrity) or self._loop.time() > deadline:
                return leaked, integrity
            await asyncio.sleep(0.5)


class RecomputedHandoffs(Simulation):
    """Hands requests off without copies: each one starts again elsewhere after its first token."""

    def __init__(self, config: SimulationConfig, on_progress: OnProgress | None = None) -> None:
        super().__init__(config, on_progress)
        self._handoffs = BackgroundTasks()

    def _on_tokens(self, number: int, times: list[float]) -> None:
        record = self.records[number]
        if not record.tokens and record.request.output_tokens > len(times):
            self._handoffs.start(self._hand_off(number))
        super()._on_tokens(number, times)

    async def _hand_off(self, number: int) -> None:
        """To the decode instance with most free blocks; the request stays if that is refused."""
        loads = self.cluster.frontend.instances.loads
        free = {load.instance_id: loads.free_blocks(load.instance_id) for load in can_receive(loads)}
        with contextlib.suppress(PdServeError):
            await self.cluster.frontend.migrate(str(number), max(free, key=free.__getitem__), "recompute")
