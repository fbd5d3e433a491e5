"""An engine without a model whose tokens depend on every byte of the KV cache.

The KV of a token is a number made of the token and its position, in real memory that `KvTransport` copies.
The next token is made of the KV of all tokens before, read from the blocks: a block that was lost, copied
too early, too late or to the wrong place changes the output. Freed blocks are overwritten.

Like vLLM's core it runs steps, visits its callers between two of them, preempts when blocks run out,
prefills in chunks, and may have a step in flight when a request is suspended.
"""

import asyncio
import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from migration.engine_interface import EngineEvents, HeldBlocks, Reservation
from migration.errors import RefusalCode
from migration.messages import BlockRun, FinalState, MigrationId, RequestDescription, RequestId
from migration.transport.kv_transport import KvRegion
from pd_serve.errors import DestinationRefusedError, EngineDeadError, SourceGoneError
from router.load import EngineLoad

T = TypeVar("T")

BLOCK_TOKENS = 4
STEP_S = 0.01
CHUNK_TOKENS = 8
TAIL_BLOCKS = 1
SLACK_BLOCKS = 1
GARBAGE = 0xDEAD_DEAD_DEAD_DEAD
MASK = (1 << 64) - 1


def kv_of(position: int, token: int) -> int:
    return (token * 0x9E37_79B9_7F4A_7C15 + position * 0xC2B2_AE3D_27D4_EB4F + 1) & MASK


def token_after(kv: Sequence[int]) -> int:
    digest = 0
    for value in kv:
        digest = (digest * 0x1000_0000_01B3 ^ value) & MASK
    return digest >> 48


def expected_output(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What any number of migrations must not change."""
    kv = [kv_of(position, token) for position, token in enumerate(prompt)]
    output: list[int] = []
    for _ in range(num_tokens):
        output.append(token_after(kv))
        kv.append(kv_of(len(kv), output[-1]))
    return output


class Payload(msgspec.Struct, frozen=True):
    request_id: RequestId
    prompt: list[int]
    max_tokens: int

    def encode(self) -> list[bytes]:
        return [msgspec.msgpack.encode(self)]


@dataclass(frozen=True, slots=True)
class Output:
    """New tokens of one request after a step, as they go to the front end."""

    request_id: RequestId
    epoch: int
    index: int
    token_ids: list[int]
    finished: bool


@dataclass(eq=False)
class Request:
    payload: list[bytes]
    request_id: RequestId
    prompt: list[int]
    max_tokens: int
    client: str
    epoch: int = 0
    output: list[int] = field(default_factory=list)
    emitted: int = 0
    computed: int = 0  # tokens whose KV is in the blocks
    in_flight: int = 0  # steps that have been scheduled and not come back
    scheduled: int = 0  # computed, once they have
    sampling: int = 0  # of them, those that will bring a token
    blocks: list[int] = field(default_factory=list)
    preemptions: int = 0
    wants_handoff: bool = False

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


@dataclass(frozen=True, slots=True)
class Step:
    request: Request
    preemptions: int
    num_tokens: int
    samples: bool


@dataclass
class Waiter:
    incarnation: int
    blocks_done: int
    suspend: bool
    answer: "asyncio.Future[BlockRun | FinalState]"


class FakeEngine:
    """Implements `migration.engine_interface.Engine`.

    Attributes:
        refusal: Said to every reservation, if set.
        reserve_s, commit_s, release_s: How long these calls wait before they visit the engine.
        cached_blocks: First blocks of an arriving request that a prefix cache is said to hold.
        fail_commits: Commits to refuse from now on.
        step_s: How long a step takes.
        steps_in_flight: 1 schedules a step ahead, as vLLM does on GPUs.
    """

    def __init__(
        self,
        sink: Callable[[Output], None],
        events: EngineEvents,
        *,
        num_blocks: int = 64,
        max_running: int = 16,
        steps_in_flight: int = 0,
    ) -> None:
        self.refusal: str | None = None
        self.reserve_s = self.commit_s = self.release_s = 0.0
        self.cached_blocks = 0
        self.fail_commits = 0
        self.step_s = STEP_S
        self.steps_in_flight = steps_in_flight
        self.num_blocks = num_blocks
        self.free = list(range(num_blocks))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.suspended: dict[RequestId, Request] = {}
        self.arriving: dict[MigrationId, Request] = {}
        self.arrived: dict[RequestId, MigrationId] = {}
        self.waiters: dict[RequestId, Waiter] = {}
        self._max_running = max_running
        self._sink = sink
        self._events = events
        self._memory = (ctypes.c_uint64 * (num_blocks * BLOCK_TOKENS))(*[GARBAGE] * num_blocks * BLOCK_TOKENS)
        self._steps: deque[list[Step]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = asyncio.Event()
        self._dead = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def regions(self) -> list[KvRegion]:
        return [KvRegion(ctypes.addressof(self._memory), self.num_blocks, BLOCK_TOKENS * 8)]

    async def stop(self) -> None:
        """Nothing comes from it any more; whoever waits for an answer waits for ever."""
        self._dead = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    # ---- requests

    async def add(
        self,
        payload: list[bytes],
        client: str,
        *,
        epoch: int = 0,
        output_token_ids: list[int] | None = None,
        handoff: bool = False,
    ) -> None:
        request = self._decode(payload, client)
        request.epoch, request.wants_handoff = epoch, handoff
        request.output = list(output_token_ids or [])
        request.emitted = len(request.output)

        def add() -> None:
            assert self._find(request.request_id) is None, "the request is here already"
            self.waiting.append(request)

        await self._call(add)

    async def abort(self, request_ids: list[RequestId], below_epoch: int | None = None) -> list[RequestId]:
        def abort() -> list[RequestId]:
            unknown = []
            for request_id in request_ids:
                request = self._find(request_id)
                if request is None:
                    unknown.append(request_id)
                elif below_epoch is None or request.epoch < below_epoch:
                    self._end(request)
            return unknown

        return await self._call(abort)

    async def abort_client(self, client: str) -> None:
        await self.abort([r.request_id for r in self._live() if r.client == client])

    # ---- source

    async def describe(self, request_id: RequestId) -> RequestDescription:
        def describe() -> RequestDescription:
            request = self._find(request_id)
            if request not in self.running:
                raise SourceGoneError(RefusalCode.NOT_RUNNING, "not running here")
            return RequestDescription(
                request_id=request_id,
                payload=request.payload,
                client=request.client,
                epoch=request.epoch,
                incarnation=request.preemptions,
                output_token_ids=list(request.output),
                num_prompt_tokens=len(request.prompt),
                max_total_tokens=len(request.prompt) + request.max_tokens,
                compatibility={"block size": str(BLOCK_TOKENS)},
            )

        return await self._call(describe)

    async def next_stage(
        self, request_id: RequestId, incarnation: int, blocks_done: int, *, suspend: bool
    ) -> BlockRun | FinalState:
        answer: asyncio.Future[BlockRun | FinalState] = asyncio.get_running_loop().create_future()

        def wait() -> None:
            assert request_id not in self.waiters, "only one call per request at a time"
            self.waiters[request_id] = Waiter(incarnation, blocks_done, suspend, answer)

        self._submit(wait)
        return await answer

    async def resume(self, request_id: RequestId, epoch: int) -> None:
        def resume() -> None:
            if (waiter := self.waiters.pop(request_id, None)) is not None:
                _settle(waiter.answer, SourceGoneError(RefusalCode.CANCELLED, "given up"))
            if (request := self.suspended.pop(request_id, None)) is not None:
                self.running.append(request)
            if (request := self._find(request_id)) is not None:
                request.epoch = max(request.epoch, epoch)

        await self._call(resume)

    async def release(self, request_id: RequestId) -> None:
        def release() -> None:
            if (request := self.suspended.pop(request_id, None)) is not None:
                self.arrived.pop(request_id, None)
                self._free(request)

        await self._call(release, after_s=self.release_s)

    # ---- destination

    async def reserve(self, migration_id: MigrationId, request: RequestDescription) -> Reservation:
        def reserve() -> Reservation:
            if self.refusal is not None:
                raise DestinationRefusedError(RefusalCode.INCOMPATIBLE, self.refusal)
            arriving = self._decode(request.payload, request.client)
            same_id = [r for r in self.arriving.values() if r.request_id == request.request_id]
            if self._find(request.request_id) or same_id:
                raise DestinationRefusedError(RefusalCode.ALREADY_HERE, "the request is here already")
            if len(self.running) + len(self.suspended) + len(self.arriving) >= self._max_running:
                raise DestinationRefusedError(RefusalCode.NO_BATCH_SLOT, "all slots are taken")
            arriving.output = list(request.output_token_ids)
            self._allocate(arriving, blocks_for(request.num_tokens) + SLACK_BLOCKS)
            self.arriving[migration_id] = arriving
            cached = min(self.cached_blocks, (request.num_tokens - 1) // BLOCK_TOKENS)
            for position in range(cached * BLOCK_TOKENS):
                self._write(arriving, position)
            return Reservation(list(arriving.blocks), cached)

        return await self._call(reserve, after_s=self.reserve_s)

    async def grow(self, migration_id: MigrationId, num_blocks: int) -> list[int]:
        def grow() -> list[int]:
            arriving = self._arriving(migration_id)
            self._allocate(arriving, num_blocks)
            return list(arriving.blocks)

        return await self._call(grow)

    async def commit(self, migration_id: MigrationId, state: FinalState) -> None:
        def commit() -> None:
            request = self._arriving(migration_id)
            if self.fail_commits:
                self.fail_commits -= 1
                raise DestinationRefusedError(RefusalCode.NO_FREE_BLOCKS, "the commit was told to fail")
            self._allocate(request, blocks_for(len(request.prompt) + len(state.output_token_ids)))
            del self.arriving[migration_id]
            request.output = list(state.output_token_ids)
            request.emitted = len(request.output)
            request.epoch = state.epoch + 1
            request.computed = request.scheduled = state.num_computed_tokens
            assert request.computed == len(request.tokens) - 1
            self.arrived[request.request_id] = migration_id
            self.running.append(request)

        await self._call(commit, after_s=self.commit_s)

    async def drop(self, migration_id: MigrationId) -> None:
        def drop() -> None:
            if (request := self.arriving.pop(migration_id, None)) is not None:
                self._free(request)
            for request_id, brought_by in list(self.arrived.items()):
                if brought_by == migration_id and (request := self._find(request_id)) is not None:
                    self._end(request)

        await self._call(drop)

    # ---- the rest

    async def live_requests(self, client: str | None = None) -> list[RequestId]:
        return await self._call(
            lambda: [r.request_id for r in [*self._live(), *self.arriving.values()]],
        )

    async def held_blocks(self) -> list[HeldBlocks]:
        raise NotImplementedError

    async def utility(self, method: str, *arguments: Any) -> Any:
        raise NotImplementedError

    async def check_integrity(self) -> list[str]:
        def check() -> list[str]:
            problems = []
            requests = [*self._live(), *self.arriving.values()]
            held = [block for request in requests for block in request.blocks]
            if len(set(held)) != len(held):
                problems.append("a block is held twice")
            if sorted(held + self.free) != list(range(self.num_blocks)):
                problems.append(f"{self.num_blocks - len(held) - len(self.free)} blocks are lost")
            if not set(self.arrived) <= {request.request_id for request in self._live()}:
                problems.append(f"ended requests are remembered as arrivals: {sorted(self.arrived)}")
            for name, table in (
                ("suspended", self.suspended),
                ("arriving", self.arriving),
                ("asked for a stage", self.waiters),
            ):
                if table:
                    problems.append(f"still {name}: {sorted(table)}")
            return problems

        return await self._call(check)

    def load(self) -> EngineLoad:
        return EngineLoad(
            total_blocks=self.num_blocks,
            free_blocks=len(self.free),
            reserved_blocks=sum(len(r.blocks) for r in self.arriving.values()),
            running=len(self.running) + len(self.suspended),
            suspended=len(self.suspended),
            waiting=len(self.waiting),
            waiting_tokens=sum(len(r.tokens) - r.computed for r in self.waiting),
            head_of_line_blocks=blocks_for(len(self.waiting[0].tokens)) if self.waiting else 0,
            block_tokens=BLOCK_TOKENS,
        )

    # ---- what a test may do to it between two steps

    def preempt(self, request_id: RequestId) -> None:
        """Blocks are gone, all has to be computed again. Does nothing to a request that is not running."""
        if (request := self._find(request_id)) in self.running:
            self._preempt(request)

    def stop_after_next_token(self, request_id: RequestId) -> None:
        request = self._find(request_id)
        assert request is not None
        request.max_tokens = len(request.output) + 1

    @contextlib.contextmanager
    def without_free_blocks(self) -> Iterator[None]:
        taken, self.free = self.free, []
        yield
        self.free += taken
        self._wake.set()

    # ---- steps

    async def _run(self) -> None:
        while True:
            while self._calls:
                self._calls.popleft()()
            self._settle_stages()
            self._admit()
            if not (self.running or any(self._steps)):
                self._steps.clear()
                self._events.on_load(self.load())
                self._wake.clear()
                await self._wake.wait()
                continue
            self._steps.append(self._schedule())
            await asyncio.sleep(self.step_s)
            while len(self._steps) > self.steps_in_flight:
                for step in self._steps.popleft():
                    self._apply(step)
            self._events.on_load(self.load())

    def _admit(self) -> None:
        while (
            self.waiting and len(self.running) + len(self.suspended) + len(self.arriving) < self._max_running
        ):
            request = self.waiting[0]
            if blocks_for(len(request.tokens) + 1) > len(self.free):
                break
            self.waiting.popleft()
            self.running.append(request)
            if request.wants_handoff:
                request.wants_handoff = False
                self._events.on_prefill_started([request.request_id])

    def _schedule(self) -> list[Step]:
        steps = []
        for request in list(self.running):
            expected = len(request.tokens) + request.sampling
            if request not in self.running or len(request.output) + request.sampling >= request.max_tokens:
                continue
            num_tokens = min(CHUNK_TOKENS, expected - request.scheduled)
            needed = blocks_for(request.scheduled + num_tokens)
            while needed - len(request.blocks) > len(self.free) and request in self.running:
                self._preempt(self.running[-1])
            if request not in self.running:
                continue
            self._allocate(request, needed)
            samples = request.scheduled + num_tokens == expected
            request.scheduled += num_tokens
            request.sampling += samples
            request.in_flight += 1
            steps.append(Step(request, request.preemptions, num_tokens, samples))
        return [step for step in steps if step.preemptions == step.request.preemptions]

    def _apply(self, step: Step) -> None:
        request = step.request
        if request.preemptions != step.preemptions or self._find(request.request_id) is not request:
            return
        for position in range(request.computed, request.computed + step.num_tokens):
            self._write(request, position)
        request.computed += step.num_tokens
        request.in_flight -= 1
        if step.samples:
            request.sampling -= 1
            request.output.append(token_after([self._read(request, i) for i in range(request.computed)]))
            finished = len(request.output) >= request.max_tokens
            output = Output(
                request.request_id,
                request.epoch,
                request.emitted,
                request.output[request.emitted :],
                finished,
            )
            request.emitted = len(request.output)
            self._sink(output)
            if finished:
                self._end(request)

    def _settle_stages(self) -> None:
        for request_id, waiter in list(self.waiters.items()):
            answer = self._next_stage(request_id, waiter)
            if answer is not None:
                del self.waiters[request_id]
                _settle(waiter.answer, answer)

    def _next_stage(
        self, request_id: RequestId, waiter: Waiter
    ) -> BlockRun | FinalState | SourceGoneError | None:
        request, done = self._find(request_id), waiter.blocks_done
        if request is None or request.preemptions != waiter.incarnation:
            return SourceGoneError(RefusalCode.FINISHED, "finished, aborted or preempted")
        if request_id not in self.suspended:
            decoding = request.output and request.scheduled >= len(request.tokens) - 1
            left = blocks_for(request.computed) - done
            if not (decoding and (waiter.suspend or left <= TAIL_BLOCKS)):
                full = request.computed // BLOCK_TOKENS
                return BlockRun(done, request.blocks[done:full]) if full > done else None
            self.running.remove(request)
            self.suspended[request_id] = request
        if request.in_flight:
            return None
        return FinalState(
            tail=BlockRun(done, request.blocks[done : blocks_for(request.computed)]),
            epoch=request.epoch,
            output_token_ids=list(request.output),
            num_computed_tokens=request.computed,
        )

    # ---- books

    def _live(self) -> list[Request]:
        return [*self.running, *self.waiting, *self.suspended.values()]

    def _find(self, request_id: RequestId) -> Request | None:
        return next((r for r in self._live() if r.request_id == request_id), None)

    def _arriving(self, migration_id: MigrationId) -> Request:
        if migration_id not in self.arriving:
            raise DestinationRefusedError(
                RefusalCode.UNKNOWN_MIGRATION, "nothing is reserved for this migration"
            )
        return self.arriving[migration_id]

    def _decode(self, payload: list[bytes], client: str) -> Request:
        content = msgspec.msgpack.decode(payload[0], type=Payload)
        return Request(payload, content.request_id, content.prompt, content.max_tokens, client)

    def _allocate(self, request: Request, num_blocks: int) -> None:
        missing = num_blocks - len(request.blocks)
        if missing > len(self.free):
            raise DestinationRefusedError(RefusalCode.NO_FREE_BLOCKS, f"no {missing} free blocks")
        for _ in range(missing):
            request.blocks.append(self.free.pop(0))

    def _free(self, request: Request) -> None:
        for block in request.blocks:
            for slot in range(BLOCK_TOKENS):
                self._memory[block * BLOCK_TOKENS + slot] = GARBAGE
        self.free += request.blocks
        request.blocks = []

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._free(request)
        request.preemptions += 1
        request.computed = request.scheduled = request.sampling = request.in_flight = 0
        self.waiting.appendleft(request)

    def _end(self, request: Request) -> None:
        self._free(request)
        if request in self.running:
            self.running.remove(request)
        if request in self.waiting:
            self.waiting.remove(request)
        self.suspended.pop(request.request_id, None)
        self.arrived.pop(request.request_id, None)
        asyncio.get_running_loop().call_soon(self._events.on_requests_ended, [request.request_id])

    def _write(self, request: Request, position: int) -> None:
        slot = request.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
        self._memory[slot] = kv_of(position, request.tokens[position])

    def _read(self, request: Request, position: int) -> int:
        return self._memory[request.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS]

    # ---- visits

    def _submit(self, call: Callable[[], None]) -> None:
        if self._dead:
            raise EngineDeadError("the engine has stopped")
        self._calls.append(call)
        self._wake.set()

    async def _call(self, function: Callable[[], T], after_s: float = 0.0) -> T:
        if after_s:
            await asyncio.sleep(after_s)
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def call() -> None:
            try:
                result: Any = function()
            except DestinationRefusedError as error:
                result = error
            except SourceGoneError as error:
                result = error
            _settle(future, result)

        self._submit(call)
        return await future


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


def _settle(future: "asyncio.Future[Any]", result: Any) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
