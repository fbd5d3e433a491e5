"""Stock vLLM as a migrating `Engine`.

Every operation is one closure that runs on the step thread between two steps. Outputs are handed over on
that thread too, so that a token's way out does not wait for the event loop.
"""

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.core import EngineCore

from migration.engine_interface import (
    EngineEvents,
    EngineFacts,
    HeldBlocks,
    HeldByClient,
    RunningRequest,
    StepProgress,
)
from migration.engine_rules import mismatch
from migration.errors import DestinationRefusedError, InvalidRequestError, RefusalCode, SourceGoneError
from migration.messages import FinalState, KvPart, MigrationId, RequestDescription, RequestId
from migration.reservation import Reservation
from migration.transport.kv_transport import KvRegion
from migration.transport.worker_transport import WorkerMemory
from migration.vllm_engine import compatibility
from migration.vllm_engine.cached_keys import RecordedKeys
from migration.vllm_engine.core_builder import build_core
from migration.vllm_engine.engine_load import read_held_blocks, read_load, read_running
from migration.vllm_engine.live_requests import LiveRequest, LiveRequests, OutputSink
from migration.vllm_engine.migrating_scheduler import MigratingScheduler
from migration.vllm_engine.migration_state import StageWaiter, Suspended
from migration.vllm_engine.prefix_store import VllmPrefixStore
from migration.vllm_engine.request_loader import RequestLoader
from migration.vllm_engine.scheduler_integrity import check_engine
from migration.vllm_engine.step_loop import StepLoop
from router.load import decisive

T = TypeVar("T")

#: Least time between two load reports of a busy engine, and between those that differ in blocks only. Each
#: wakes the event loop and its receivers, which take the interpreter lock and cores from the steps.
LOAD_INTERVAL_S, PROGRESS_INTERVAL_S = 0.05, 0.1


class VllmEngine:
    """See `migration.engine_interface.Engine` for the contract of the calls.

    Args:
        make_config: Builds the engine's configuration. Runs on the step thread, as all of vLLM does.
        sink: Takes (client, outputs, spans) after every step; called on the step thread, must not block.
        keep_ended_s: Time that ended requests are kept for clients that come back, in seconds.
    """

    def __init__(
        self,
        make_config: Callable[[], VllmConfig],
        sink: OutputSink,
        events: EngineEvents,
        keep_ended_s: float = 0.0,
    ) -> None:
        self._make_config = make_config
        self._sink = sink
        self._events = events
        self._steps = StepLoop(
            self._build,
            on_outputs=self._emit,
            on_boundary=self._at_boundary,
            on_idle=self._report_load,
            on_death=events.on_death,
        )
        self._live = LiveRequests(keep_ended_s, lambda n: self._steps.notify(events.on_unmovable, n))
        self._loader: RequestLoader = None  # type: ignore[assignment]
        self.prefixes: VllmPrefixStore = None  # type: ignore[assignment]
        self._last_load_at = self._told_at = 0.0
        self._told: Any = None
        self.core: EngineCore = None
        self.scheduler: MigratingScheduler = None  # type: ignore[assignment]
        self.regions: list[KvRegion] = []
        self.workers: list[WorkerMemory] = []
        self.compatibility: dict[str, str] = {}
        self.no_migration: str | None = None
        self.facts: EngineFacts
        self.cached_keys: RecordedKeys

    async def start(self) -> None:
        await self._steps.start()

    @property
    def progress(self) -> StepProgress:
        return self._steps.progress

    async def stop(self) -> None:
        await self._steps.stop()

    # ---- requests

    async def add(
        self,
        payload: list[bytes],
        client: str,
        *,
        epoch: int = 0,
        output_token_ids: list[int] | None = None,
        handoff: bool = False,
    ) -> bool:
        request_id, request = self._loader.decode(payload)
        done = output_token_ids or []

        def add() -> bool:
            self._loader.enter(request)
            if not self._end_below(request_id, epoch):
                return False
            if done:
                self._loader.continue_by_recompute(request)
            else:
                self.core.add_request(request)
            live = LiveRequest(request_id, payload, client, epoch, request)
            self._live.enters(request.request_id, live)
            if handoff and self.no_migration is None and live.unmovable is None:
                self.scheduler.handoff_ids.add(request.request_id)
            return True

        if done:
            self._loader.check_can_continue()
            await self._loader.continue_from(request, done)
        return await self._steps.call(add)

    async def abort(self, request_ids: list[RequestId], below_epoch: int | None = None) -> list[RequestId]:
        def abort() -> list[RequestId]:
            known = {rid: stay for rid in request_ids if (stay := self._live.stay_of(rid)) is not None}
            self._end([s for s in known.values() if below_epoch is None or self._live[s].epoch < below_epoch])
            return [request_id for request_id in request_ids if request_id not in known]

        return await self._steps.call(abort)

    async def abort_client(self, client: str) -> None:
        await self._steps.call(lambda: self._end(self._live.stays(client)))

    # ---- source

    async def running_requests(self) -> list[RunningRequest]:
        if self.no_migration is not None:
            return []
        return await self._steps.call(lambda: read_running(self.scheduler, self._live))

    async def describe(self, request_id: RequestId) -> RequestDescription:
        def describe() -> RequestDescription:
            self._check_migration()
            request = self.scheduler.running_request(self._live.stay_of(request_id))
            live = self._live[request.request_id]
            if live.unmovable is not None:
                text = f"a request with {compatibility.UNMOVABLE[live.unmovable]} cannot move"
                raise DestinationRefusedError(RefusalCode.UNSUPPORTED_REQUEST, text)
            return live.describe(self.compatibility)

        return await self._steps.call(describe)

    async def next_stage(
        self, request_id: RequestId, incarnation: int, tokens_done: int, *, suspend: bool, reader: MigrationId
    ) -> KvPart | FinalState:
        self._check_migration()
        future: asyncio.Future[KvPart | FinalState] = asyncio.get_running_loop().create_future()

        def answer(result: KvPart | Suspended | SourceGoneError) -> None:
            if isinstance(result, Suspended):
                epoch = self._live[result.request.request_id].epoch
                result = self._loader.final_state(result, epoch)  # type: ignore[assignment]
            self._steps.settle(future, result)

        def wait() -> None:
            if (stay := self._live.stay_of(request_id)) is None:
                return answer(SourceGoneError(RefusalCode.FINISHED, "the request has finished"))
            self.scheduler.wait_for_stage(
                StageWaiter(stay, incarnation, tokens_done, suspend, reader, answer)
            )

        self._steps.submit(wait)
        return await future

    async def resume(self, request_id: RequestId, epoch: int) -> None:
        def resume() -> None:
            if (stay_id := self._live.stay_of(request_id)) is not None:
                self.scheduler.resume(stay_id)
                self._live[stay_id].epoch = max(self._live[stay_id].epoch, epoch)

        await self._steps.call(resume)

    async def release(self, request_id: RequestId) -> None:
        def release() -> None:
            if (stay_id := self._live.stay_of(request_id)) is not None and self.scheduler.release(stay_id):
                self._live.ends(stay_id)

        await self._steps.call(release)

    async def unpin(self, reader: MigrationId) -> None:
        await self._steps.call(lambda: self.scheduler.migrated_blocks.unpin(reader))

    # ---- destination

    async def reserve(self, migration_id: MigrationId, request: RequestDescription) -> Reservation:
        self._check_migration()
        if (why := mismatch(request.compatibility, self.compatibility)) is not None:
            raise DestinationRefusedError(RefusalCode.INCOMPATIBLE, why)
        if request.max_total_tokens > (most := self.scheduler.max_model_len):
            text = f"{request.max_total_tokens} tokens do not fit this instance's {most}"
            raise DestinationRefusedError(RefusalCode.TOO_LONG, text)
        request_id, arriving = await self._loader.decode_arriving(request.payload, request.output_token_ids)

        def reserve() -> Reservation:
            self._loader.arrive(arriving)
            reservation = self.scheduler.reserve(migration_id, arriving)
            live = LiveRequest(request_id, request.payload, request.client, request.epoch, arriving)
            self._live.arrives(arriving.request_id, live)
            return reservation

        return await self._steps.call(reserve)

    async def grow(self, migration_id: MigrationId, num_tokens: int) -> list[list[int]]:
        return await self._steps.call(lambda: self.scheduler.grow(migration_id, num_tokens))

    async def commit(self, migration_id: MigrationId, state: FinalState) -> None:
        def commit() -> None:
            arriving = self.scheduler.arriving_request(migration_id)
            if (live := self._live.get(arriving.request_id)) is None:
                raise DestinationRefusedError(RefusalCode.FINISHED, "the request's client has gone")
            self._loader.replay(arriving, state.output_token_ids[arriving.num_output_tokens :])
            if not self._end_below(live.request_id, state.epoch + 1):
                raise DestinationRefusedError(RefusalCode.SUPERSEDED, "a newer copy of the request is here")
            request = self.scheduler.commit(migration_id, state.num_computed_tokens)
            live.epoch = state.epoch + 1
            self._live.enters(request.request_id, live)
            self._loader.install(request, state.num_computed_tokens, state.rng_state)

        await self._steps.call(commit)

    async def publish(self, migration_id: MigrationId) -> None:
        await self._steps.call(lambda: self.scheduler.publish(migration_id))

    async def drop(self, migration_id: MigrationId) -> None:
        def drop() -> None:
            if (stay_id := self.scheduler.drop(migration_id)) is not None:
                self._live.ends(stay_id)

        await self._steps.call(drop)

    # ---- state

    async def check_integrity(self, under_way: Collection[MigrationId] = ()) -> list[str]:
        migrates, stays = self.no_migration is None, self._live.stays
        return await self._steps.call(lambda: check_engine(self.core, set(stays()), under_way, migrates))

    async def clients_of(self, stem: str) -> set[str]:
        return await self._steps.call(lambda: self._live.clients_of(stem))

    async def adopt(
        self, request_id: RequestId, payload: list[bytes], client: str, living: Collection[str]
    ) -> bool:
        def adopt() -> bool:
            if (former := self._live.adopt(request_id, payload, client, living)) is None:
                return False
            if self.no_migration is None and (stay_id := self._live.stay_of(request_id)) is not None:
                self.scheduler.keep(stay_id)
            self._steps.notify(self._events.on_requests_ended, [former])
            self._live.resend([(request_id, 0)], self._sink)
            return True

        return await self._steps.call(adopt)

    async def visit_requests(self, visit: Callable[[HeldByClient], T]) -> T:
        return await self._steps.call(lambda: visit(self._live.held()))

    async def resend(self, asked: list[tuple[RequestId, int]]) -> None:
        await self._steps.call(lambda: self._live.resend(asked, self._sink))

    async def live_requests(self, client: str | None = None) -> list[RequestId]:
        return await self._steps.call(lambda: self._live.request_ids(self._live.stays(client)))

    async def held_blocks(self) -> list[HeldBlocks]:
        return await self._steps.call(lambda: read_held_blocks(self.core.scheduler, self._live.name_of))

    async def utility(self, method: str, *arguments: object) -> object:
        if method not in compatibility.UTILITIES:
            raise InvalidRequestError(f"{method} is not a utility of the engine")
        owner = self._loader if method == "load_adapter" else self.core
        return await self._steps.call(lambda: getattr(owner, method)(*arguments))

    # ---- on the step thread

    def _build(self) -> EngineCore:
        built = build_core(self._make_config(), self._steps.fail)
        self.core, self.scheduler = built.core, built.core.scheduler
        self.no_migration, self.compatibility = built.no_migration, built.compatibility
        self.regions, self.workers = built.regions, built.workers
        self.facts, self.cached_keys = built.facts, RecordedKeys(built.cached_keys, self._steps)
        self._loader = RequestLoader(self.core)
        migrating = self.scheduler if self.no_migration is None else None
        self.prefixes = VllmPrefixStore(self._steps, self._loader, migrating, self.compatibility)
        if self.no_migration is None:
            tell, describe, asked = self._steps.notify, self._live.describe, self._events.on_prefill_started
            self.scheduler.on_prefill_started = lambda stays: tell(asked, describe(stays, self.compatibility))
        return self.core

    def _at_boundary(self) -> None:
        if self.no_migration is None:
            self.scheduler.settle_stages()
        if time.monotonic() - self._last_load_at >= LOAD_INTERVAL_S:
            self._report_load(idle=False)

    def _emit(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        if ended := self._live.emit(outputs, self._sink):
            self._forget(ended)

    def _end(self, stay_ids: list[str]) -> None:
        self.core.abort_requests(stay_ids)
        self._forget(stay_ids)

    def _end_below(self, request_id: RequestId, epoch: int) -> bool:
        """Ends an older copy of a request. Returns False if the one here is not older."""
        if (stay_id := self._live.stay_of(request_id)) is None:
            return True
        if self._live[stay_id].epoch >= epoch:
            return False
        self._end([stay_id])
        return True

    def _forget(self, ended: list[str]) -> None:
        request_ids = self._live.request_ids(ended)
        for stay_id in ended:
            self._live.ends(stay_id)
        self._steps.notify(self._events.on_requests_ended, request_ids)

    def _report_load(self, *, idle: bool = True) -> None:
        now = self._last_load_at = time.monotonic()
        load = read_load(self.core.scheduler)
        told = decisive(load)
        if idle or told != self._told or now - self._told_at >= PROGRESS_INTERVAL_S:
            self._told, self._told_at = told, now
            self._steps.notify(self._events.on_load, load)

    def _check_migration(self) -> None:
        if self.no_migration is not None:
            text = f"migration is off here: {self.no_migration}"
            raise DestinationRefusedError(RefusalCode.UNSUPPORTED_ENGINE, text)
