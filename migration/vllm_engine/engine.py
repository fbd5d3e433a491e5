"""vLLM's `EngineCore`, stepped in a thread of ours, as a migrating `Engine`.

Calls from the event loop become closures in the step thread's queue and run between two steps; their
results go back to the loop. Outputs are handed over on the step thread, so that a token's way out does
not wait for the loop.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder

from migration.engine import EngineEvents, EngineLoad, Reservation
from migration.errors import DestinationRefusedError, EngineDeadError, InvalidRequestError, SourceGoneError
from migration.messages import BlockRun, FinalState, MigrationId, RequestDescription, RequestId
from migration.transport.base import KvRegion
from migration.transport.regions import kv_regions
from migration.vllm_engine import support, worker
from migration.vllm_engine.executor import executor_class
from migration.vllm_engine.scheduler import (
    MigratingAsyncScheduler,
    MigratingScheduler,
    StageWaiter,
    Suspended,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Least time between two load reports of a busy engine.
LOAD_INTERVAL_S = 0.02


@dataclass(slots=True)
class LiveRequest:
    """What the step thread knows of a request beside vLLM's own `Request`.

    Attributes:
        payload: The request as it came, to be sent on unchanged.
        client: Endpoint that takes its tokens.
        epoch: Ownership epoch; tokens carry it.
        emitted: Output tokens handed to the client so far, by any owner: the next token's index.
    """

    payload: list[bytes]
    client: str
    epoch: int
    emitted: int


#: Methods of `EngineCore` that vLLM's front end may call by name.
UTILITIES = frozenset(
    {
        "get_supported_tasks",
        "reset_mm_cache",
        "reset_prefix_cache",
        "reset_encoder_cache",
        "is_sleeping",
        "is_scheduler_paused",
        "list_loras",
        "get_weight_version",
    }
)

#: (request's ownership epoch, index of the first new token), one per output, in the outputs' order.
TokenSpan = tuple[int, int]
OutputSink = Callable[[str, EngineCoreOutputs, list[TokenSpan]], None]


class VllmEngine:
    """See `migration.engine.Engine` for the contract of the calls.

    Args:
        make_config: Builds the engine's configuration. Runs on the step thread, as all of vLLM does.
        sink: Takes (client, outputs, spans) after every step; called on the step thread, must not block.
    """

    def __init__(self, make_config: Callable[[], VllmConfig], sink: OutputSink, events: EngineEvents) -> None:
        self._make_config = make_config
        self._sink = sink
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._live: dict[str, LiveRequest] = {}
        self._request_decoder = MsgpackDecoder(EngineCoreRequest)
        self._stopping = False
        self._last_load_at = 0.0
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._dead: BaseException | None = None
        self.core: EngineCore = None
        self.scheduler: MigratingScheduler = None  # type: ignore[assignment]
        self.regions: list[KvRegion] = []
        self.compatibility: dict[str, str] = {}
        self.no_migration: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)

    async def start(self) -> None:
        """Loads the model. Raises: whatever vLLM raises."""
        self._thread.start()
        await self._ready

    async def stop(self) -> None:
        """Ends the step thread after the step it is in."""
        self._stopping = True
        self._calls.put(lambda: None)
        await asyncio.to_thread(self._thread.join, 5.0)

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
        request = self._decode(payload)
        done = output_token_ids or []

        def add() -> None:
            self._live[request.request_id] = LiveRequest(payload, client, epoch, len(done))
            if handoff and self.no_migration is None and support.unmovable(request) is None:
                self.scheduler.handoff_ids.add(request.request_id)
            if done:
                self._check_migration()
                self._replay(request, done)
                self.scheduler.continue_by_recompute(request)
                self._install(request, 0, None)
            else:
                self.core.add_request(request)

        if done:
            await self._grammar(request)
        await self._call(add)

    async def abort(self, request_ids: list[RequestId], below_epoch: int | None = None) -> list[RequestId]:
        def abort() -> list[RequestId]:
            known = [request_id for request_id in request_ids if request_id in self.core.scheduler.requests]
            ended = [
                request_id
                for request_id in known
                if below_epoch is None or self._live[request_id].epoch < below_epoch
            ]
            self.core.abort_requests(ended)
            self._forget(ended)
            return [request_id for request_id in request_ids if request_id not in known]

        return await self._call(abort)

    async def abort_client(self, client: str) -> None:
        def abort() -> None:
            ids = [request_id for request_id, live in self._live.items() if live.client == client]
            self.core.abort_requests(ids)
            self._forget(ids)

        await self._call(abort)

    # ---- source

    async def describe(self, request_id: RequestId) -> RequestDescription:
        def describe() -> RequestDescription:
            self._check_migration()
            request = self.scheduler.running_request(request_id)
            if (why := support.unmovable(request)) is not None:
                raise DestinationRefusedError(f"a request with {why} cannot move")
            live = self._live[request_id]
            return RequestDescription(
                request_id=request_id,
                payload=live.payload,
                client=live.client,
                epoch=live.epoch,
                incarnation=request.num_preemptions,
                output_token_ids=list(request.output_token_ids),
                num_prompt_tokens=request.num_prompt_tokens,
                max_total_tokens=request.num_prompt_tokens + request.max_tokens,
                compatibility=self.compatibility,
            )

        return await self._call(describe)

    async def next_stage(
        self, request_id: RequestId, incarnation: int, blocks_done: int, *, suspend: bool
    ) -> BlockRun | FinalState:
        future: asyncio.Future[BlockRun | FinalState] = self._loop.create_future()

        def answer(result: BlockRun | Suspended | SourceGoneError) -> None:
            if isinstance(result, Suspended):
                result = self._final_state(result)  # type: ignore[assignment]
            self._loop.call_soon_threadsafe(_settle, future, result)

        waiter = StageWaiter(request_id, incarnation, blocks_done, suspend, answer)
        self._submit(lambda: self.scheduler.wait_for_stage(waiter))
        return await future

    async def resume(self, request_id: RequestId, epoch: int) -> None:
        def resume() -> None:
            self.scheduler.resume(request_id)
            if (live := self._live.get(request_id)) is not None:
                live.epoch = max(live.epoch, epoch)

        await self._call(resume)

    async def release(self, request_id: RequestId) -> None:
        def release() -> None:
            self.scheduler.release(request_id)
            self._live.pop(request_id, None)

        await self._call(release)

    # ---- destination

    async def reserve(self, migration_id: MigrationId, request: RequestDescription) -> Reservation:
        self._check_migration()
        if (why := support.mismatch(request.compatibility, self.compatibility)) is not None:
            raise DestinationRefusedError(why)
        if request.max_total_tokens > self.scheduler.max_model_len:
            raise DestinationRefusedError(
                f"{request.max_total_tokens} tokens do not fit this instance's {self.scheduler.max_model_len}"
            )
        arriving = self._decode(request.payload)
        await self._grammar(arriving)

        def reserve() -> Reservation:
            self._replay(arriving, request.output_token_ids)
            blocks, present = self.scheduler.reserve(migration_id, arriving)
            self._live[arriving.request_id] = LiveRequest(request.payload, request.client, request.epoch, 0)
            return Reservation(blocks, present)

        return await self._call(reserve)

    async def grow(self, migration_id: MigrationId, num_blocks: int) -> list[int]:
        return await self._call(lambda: self.scheduler.grow(migration_id, num_blocks))

    async def commit(self, migration_id: MigrationId, state: FinalState) -> None:
        def commit() -> None:
            arriving = self.scheduler.migration.arriving.get(migration_id)
            if arriving is None:
                raise DestinationRefusedError("nothing is reserved for this migration")
            self._replay(arriving, state.output_token_ids[arriving.num_output_tokens :])
            request = self.scheduler.commit(migration_id, state.num_computed_tokens)
            live = self._live[request.request_id]
            live.epoch, live.emitted = state.epoch + 1, len(state.output_token_ids)
            self._install(request, state.num_computed_tokens, state.rng_state)

        await self._call(commit)

    async def drop(self, migration_id: MigrationId) -> None:
        def drop() -> None:
            arriving = self.scheduler.migration.arriving.get(migration_id)
            request_id = arriving.request_id if arriving is not None else None
            committed_id = self.scheduler.drop(migration_id)
            self._live.pop(request_id or committed_id or "", None)

        await self._call(drop)

    # ---- state

    async def check_integrity(self) -> list[str]:
        def check() -> list[str]:
            known = set(self.core.scheduler.requests)
            problems = []
            if self.no_migration is None:
                problems += self.scheduler.check_integrity()
                known |= {r.request_id for r in self.scheduler.migration.arriving.values()}
            if lost := set(self._live) - known:
                problems.append(f"bookkeeping for requests that are gone: {sorted(lost)}")
            if not known and not self.core.scheduler.has_requests():
                kept = self.core.collective_rpc(worker.num_requests)[0]
                if kept:
                    problems.append(f"the model runner keeps state of {kept} requests at rest")
            return problems

        return await self._call(check)

    async def live_requests(self) -> list[RequestId]:
        return await self._call(lambda: [RequestId(request_id) for request_id in self._live])

    async def utility(self, method: str, *arguments: Any) -> Any:
        if method not in UTILITIES:
            raise InvalidRequestError(f"{method} is not a utility of the engine")
        return await self._call(lambda: getattr(self.core, method)(*arguments))

    # ---- step thread

    def _run(self) -> None:
        try:
            self._build()
            self._loop.call_soon_threadsafe(_settle, self._ready, None)
        except BaseException as error:
            self._dead = error
            self._loop.call_soon_threadsafe(_settle, self._ready, error)
            return
        try:
            while not self._stopping:
                self._run_calls()
                self._step()
        except BaseException as error:
            self._dead = error
            logger.exception("the engine's step loop has failed")
            self._loop.call_soon_threadsafe(self._events.on_death, error)

    def _build(self) -> None:
        config = self._make_config()
        scheduling = config.scheduler_config
        missing = support.missing_names()
        if not missing:
            # The class has to match: a synchronous scheduler under an asynchronous configuration loses
            # the overlap of scheduling and execution.
            scheduling.scheduler_cls = (
                MigratingAsyncScheduler if scheduling.async_scheduling else MigratingScheduler
            )
        self.core = EngineCore(config, executor_class(config), log_stats=True)
        self.scheduler = self.core.scheduler
        if not missing:
            missing = support.missing_attributes(self.core)
        if missing:
            self.no_migration = "this vLLM lacks " + ", ".join(missing)
        else:
            self.no_migration = support.unsupported_engine(config, self.core.scheduler.kv_cache_config)
        if self.no_migration is None:
            self._map_kv_memory(config)
        if self.no_migration is not None:
            logger.error("SERVING WITHOUT MIGRATION: %s", self.no_migration)
        else:
            self.scheduler.on_prefill_started = self._prefill_started

    def _map_kv_memory(self, config: VllmConfig) -> None:
        tensors = self.core.collective_rpc(worker.kv_caches)[0]
        num_blocks = self.core.scheduler.kv_cache_config.num_blocks
        try:
            self.regions = kv_regions(tensors, num_blocks)
        except ValueError as error:
            self.no_migration = str(error)
            return
        sizes = [(region.num_blocks, region.block_bytes) for region in self.regions]
        self.compatibility = support.compatibility(config, sizes)

    def _run_calls(self) -> None:
        """Runs what has been asked for; sleeps until something is, if there is nothing to step."""
        core = self.core
        if not (core.scheduler.has_requests() or core.batch_queue or self._stopping):
            self._report_load()
            self._calls.get()()
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                break
            call()
        if self.no_migration is None:
            self.scheduler.settle_stages()

    def _step(self) -> None:
        core = self.core
        if not (core.scheduler.has_requests() or core.batch_queue):
            return
        outputs, executed = core.step_fn()
        core.post_step(executed)
        if outputs:
            self._emit(outputs)
        if self.no_migration is None:
            self.scheduler.settle_stages()
        if not executed and not outputs:
            time.sleep(0.001)  # everything waits (for blocks, a grammar): as vLLM's own loop does
        if time.monotonic() - self._last_load_at >= LOAD_INTERVAL_S:
            self._report_load()

    def _emit(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        by_client: dict[str, tuple[list[Any], list[TokenSpan]]] = defaultdict(lambda: ([], []))
        ended: list[str] = []
        stats = None
        for batch in outputs.values():
            stats = batch.scheduler_stats or stats
            for output in batch.outputs:
                live = self._live.get(output.request_id)
                if live is None:
                    continue
                items, spans = by_client[live.client]
                items.append(output)
                spans.append((live.epoch, live.emitted))
                live.emitted += len(output.new_token_ids)
                if output.finish_reason is not None:
                    ended.append(output.request_id)
        for client, (items, spans) in by_client.items():
            self._sink(client, EngineCoreOutputs(outputs=items, scheduler_stats=stats), spans)
            stats = None
        if ended:
            self._forget(ended)

    def _forget(self, ended: list[Any]) -> None:
        for request_id in ended:
            self._live.pop(request_id, None)
        if self.no_migration is None:
            self.scheduler.forget_arrivals(ended)
        self._loop.call_soon_threadsafe(self._events.on_requests_ended, ended)

    def _report_load(self) -> None:
        self._last_load_at = time.monotonic()
        self._loop.call_soon_threadsafe(self._events.on_load, self._load())

    def _load(self) -> EngineLoad:
        scheduler = self.core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        queued = [*scheduler.kv_holding_waiting, *scheduler.waiting]
        backlog = sum(r.num_tokens - r.num_computed_tokens for r in queued)
        backlog += sum(r.num_tokens - r.num_computed_tokens for r in scheduler.running if r.is_prefill_chunk)
        migration = None if self.no_migration else self.scheduler.migration
        arriving = migration.arriving.values() if migration else ()
        block_tokens = scheduler.block_size
        get_ids = scheduler.kv_cache_manager.get_block_ids
        return EngineLoad(
            total_blocks=pool.num_gpu_blocks - 1,
            free_blocks=pool.get_num_free_blocks(),
            reserved_blocks=sum(len(get_ids(r.request_id)[0]) for r in arriving),
            running=len(scheduler.running),
            suspended=len(migration.suspended) if migration else 0,
            waiting=len(queued),
            waiting_tokens=backlog,
            head_of_line_blocks=-(-queued[0].num_tokens // block_tokens) if queued else 0,
            block_tokens=block_tokens,
        )

    def _prefill_started(self, request_ids: list[RequestId]) -> None:
        self._loop.call_soon_threadsafe(self._events.on_prefill_started, request_ids)

    def _final_state(self, suspended: Suspended) -> FinalState:
        request = suspended.request
        live = self._live[request.request_id]
        return FinalState(
            tail=suspended.tail,
            epoch=live.epoch,
            output_token_ids=list(request.output_token_ids),
            num_computed_tokens=request.num_computed_tokens,
            rng_state=self.core.collective_rpc(worker.rng_state, args=(request.request_id,))[0],
        )

    def _replay(self, request: Request, token_ids: list[int]) -> None:
        """Appends output tokens as decoding did, so that a grammar takes the same way."""
        manager = self.core.structured_output_manager
        if not request.use_structured_output:
            request.append_output_token_ids(token_ids)
            return
        for token_id in token_ids:
            request.append_output_token_ids(token_id)
            if not manager.accept_tokens(request, [token_id]):
                raise DestinationRefusedError("the grammar does not accept the tokens so far")

    def _install(self, request: Request, num_computed_tokens: int, rng_state: bytes | None) -> None:
        if self.scheduler.use_v2_model_runner:
            return
        self.core.collective_rpc(
            worker.install_request,
            args=(
                request.request_id,
                request.prompt_token_ids,
                list(request.output_token_ids),
                request.sampling_params,
                num_computed_tokens,
                rng_state,
            ),
        )

    # ---- between the threads

    def _decode(self, payload: list[bytes]) -> Request:
        message: EngineCoreRequest = self._request_decoder.decode(payload)
        message.client_index = 0  # clients are told apart by their endpoint
        request, _ = self.core.preprocess_add_request(message)
        return request

    async def _grammar(self, request: Request) -> None:
        """Waits until a structured request's grammar is compiled.

        Raises: DestinationRefusedError: it cannot be.
        """
        structured = request.structured_output_request
        if structured is None:
            return
        async with asyncio.timeout(30.0):
            while not structured.is_grammar_ready:  # noqa: ASYNC110 - vLLM offers nothing to wait on
                await asyncio.sleep(0.002)
        if isinstance(structured.grammar, Exception):
            raise DestinationRefusedError(f"the grammar does not compile: {structured.grammar}")

    def _check_migration(self) -> None:
        if self.no_migration is not None:
            raise DestinationRefusedError(f"migration is off here: {self.no_migration}")

    def _submit(self, call: Callable[[], None]) -> None:
        if self._dead is not None:
            raise EngineDeadError(f"the engine has stopped: {self._dead}")
        self._calls.put(call)

    async def _call(self, function: Callable[[], T]) -> T:
        """Runs `function` on the step thread between two steps."""
        future: asyncio.Future[T] = self._loop.create_future()

        def call() -> None:
            try:
                result: Any = function()
            except Exception as error:
                result = error
            self._loop.call_soon_threadsafe(_settle, future, result)

        self._submit(call)
        return await future


def _settle(future: "asyncio.Future[Any]", result: Any) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
