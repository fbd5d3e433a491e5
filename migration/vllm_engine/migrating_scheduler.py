"""Taking a running request out of vLLM's scheduler, and putting one in that was decoded elsewhere.

One mixin serves `Scheduler` and `AsyncScheduler`. It relies on these facts of vLLM 0.32
(`vllm/v1/core/sched/scheduler.py`):

- `update_from_output` finds requests in `self.requests`, not in `self.running`: a request taken off
  `running` is not scheduled any more, while steps in flight still drain into it. Putting it back undoes it.
- `schedule` drains `kv_holding_waiting` first: a waiting request with computed tokens and blocks of its
  own enters the batch there, without prefill.
- Between two steps all tokens but the last sampled one have their KV in blocks. What is in which block, and
  what is written again, is in `cache_groups`.

All methods run on the engine's step thread, between steps.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from migration.engine_rules import next_stage, should_suspend, slack_tokens, tail
from migration.errors import DestinationRefusedError, RefusalCode, SourceGoneError
from migration.messages import KvPart
from migration.reservation import Reservation
from migration.vllm_engine.cache_groups import CacheGroups
from migration.vllm_engine.local_tier import tier_of
from migration.vllm_engine.lora_adapters import slots_kept
from migration.vllm_engine.migrated_blocks import MigratedBlocks
from migration.vllm_engine.migration_state import MigrationState, StageWaiter, Suspended
from migration.vllm_engine.step_timer import StepTimer


class MigrationMixin:
    """Adds migration to a vLLM scheduler class that follows it in the bases."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the scheduler class's own

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.migration = MigrationState()
        tier = tier_of(self)
        self.cache_groups = CacheGroups(self.kv_cache_manager, tier)
        self.migrated_blocks = MigratedBlocks(self.kv_cache_manager, tier)
        self.handoff_ids: set[str] = set()
        self.on_prefill_started: Callable[[list[Any]], None] = lambda request_ids: None
        self.max_active: int = self.max_num_active_reqs
        if self.vllm_config.max_concurrent_batches > 1:
            # A step in flight may still write the blocks of a request that has just been freed, and
            # a migration would write into them unordered with that step.
            self.defer_block_free = True
        self._allocate_slots: Callable[..., Any] = self.kv_cache_manager.allocate_slots

    # ---- hooks into vLLM's scheduler

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        config = self.scheduler_config
        # Only while it matters: a call for each request of the batch would take 1 % of a step.
        manager = self.kv_cache_manager
        manager.allocate_slots = self._allocate if self.kv_holding_waiting else self._allocate_slots
        limit = config.long_prefill_token_threshold
        entering = [r for r in self.kv_holding_waiting if r.num_tokens - r.num_computed_tokens == 1]
        if entering:
            config.long_prefill_token_threshold = self._prefill_limit(len(entering), limit)
        held = (*self.migration.suspended.values(), *self.migration.arriving.values())
        try:
            with slots_kept(self.lora_config, self.running, held):
                output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            config.long_prefill_token_threshold = limit
        if entering:
            self.running.sort(key=_is_prefilling)  # the running list gets its tokens in its order
        entered = [r.req_id for r in output.scheduled_new_reqs]
        entered += output.scheduled_cached_reqs.resumed_req_ids
        if self.defer_block_free:
            self.migration.entered_at.update(dict.fromkeys(entered, self.sched_step_seq))
        if self.handoff_ids:
            started = [request_id for request_id in entered if request_id in self.handoff_ids]
            if started:
                self.handoff_ids.difference_update(started)
                self.on_prefill_started(started)
        return output

    def _allocate(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """A request that has its blocks is resumed: the watermark is for those that are admitted."""
        if request.num_computed_tokens:
            kwargs["has_scheduled_reqs"] = False
        return self._allocate_slots(request, *args, **kwargs)

    def _prefill_limit(self, entering: int, limit: int) -> int:
        """Tokens that a prompt may take of the next step (0: all), so that others can enter with one each.

        A prompt in progress would take all tokens of all steps until it is done.
        """
        prompts = sum(map(_is_prefilling, self.running))
        loading = len(self.kv_holding_waiting) - entering  # from a KV tier; their other tokens are prefilled
        if not prompts + loading:
            return limit
        left: int = self.max_num_scheduled_tokens - entering - (len(self.running) - prompts)
        share = max(1, left // (prompts + loading))
        return min(limit, share) if limit else share

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Called for every request that ends: a stop while it drains, or an abort."""
        result = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        request_id = request.request_id
        self.handoff_ids.discard(request_id)
        for table in (self.migration.suspended, self.migration.arrived, self.migration.entered_at):
            table.pop(request_id, None)
        self.migrated_blocks.forget(request_id)
        self._hold_slots()
        return result

    def has_finished_requests(self) -> bool:
        """With a connector, vLLM steps on while there are requests that are in no queue."""
        unseen = len(self.requests) - sum(self.get_request_counts()) - len(self.migration.suspended)
        return bool(self.finished_req_ids) or (self.connector is not None and unseen > 0)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Returns False while a migration holds blocks, as vLLM's does while a running request holds some.

        Preempted, running requests hold none, and vLLM takes it for an error that some are held then.
        """
        try:
            return bool(super().reset_prefix_cache(reset_running_requests, reset_connector))  # type: ignore[misc]
        except RuntimeError:
            if reset_running_requests and not self.running:
                return False
            raise

    def _hold_slots(self) -> None:
        """Keeps a model-runner slot free for every request that may enter or come back."""
        held = len(self.migration.suspended) + len(self.migration.arriving)
        self.max_num_active_reqs: int = self.max_active - held

    # ---- source

    def running_request(self, request_id: str | None) -> Request:
        """Raises: SourceGoneError: not in the batch here."""
        request: Request | None = self.requests.get(request_id)
        if request is None or request.is_finished():
            raise SourceGoneError(RefusalCode.NOT_HERE, "the request is not here")
        if request.status is not RequestStatus.RUNNING or request_id in self.migration.suspended:
            text = "the request is not running (waiting, preempted or suspended)"
            raise SourceGoneError(RefusalCode.NOT_RUNNING, text)
        return request

    def wait_for_stage(self, waiter: StageWaiter) -> None:
        self.migration.waiters[waiter.request_id] = waiter

    def settle_stages(self) -> None:
        """Answers every waiter whose question has an answer at this step boundary."""
        for waiter in list(self.migration.waiters.values()):
            answer = self._next_stage(waiter)
            if answer is not None:
                del self.migration.waiters[waiter.request_id]
                if not isinstance(answer, SourceGoneError):
                    part = answer if isinstance(answer, KvPart) else answer.tail
                    self.migrated_blocks.pin(waiter.reader, part.block_ids)
                waiter.answer(answer)

    def _next_stage(self, waiter: StageWaiter) -> KvPart | Suspended | SourceGoneError | None:
        request_id = waiter.request_id
        request: Request | None = self.requests.get(request_id)
        if request is None or request.is_finished():
            return SourceGoneError(RefusalCode.FINISHED, "the request has finished")
        if request.num_preemptions != waiter.incarnation:
            return SourceGoneError(RefusalCode.PREEMPTED, "the request was preempted")
        if self.migration.entered_at.get(request_id, 0) > self.processed_step_seq:
            # Blocks that it found in the prefix cache may be computed in the very step it entered with.
            return None
        # num_computed_tokens counts steps in flight already; only what is behind them is in the blocks.
        safe_tokens = request.num_computed_tokens - request.num_in_flight_tokens
        groups, done = self.cache_groups, waiter.tokens_done
        if request_id not in self.migration.suspended:
            decoding = request.num_output_tokens > 0 and not request.is_prefill_chunk
            size = groups.stage_tokens
            if not should_suspend(safe_tokens, size, done, decoding=decoding, suspend=waiter.suspend):
                return next_stage(groups.tables(request_id), safe_tokens, size, done)
            if request not in self.running:
                return SourceGoneError(RefusalCode.NOT_RUNNING, "the request is not running")
            self.running.remove(request)
            self.migration.suspended[request_id] = request
            request.spec_token_ids = []  # drafts: the next step, here or there, makes others
            self._hold_slots()
        if request.num_in_flight_tokens:
            return None  # drains with the steps in flight
        computed = request.num_computed_tokens
        assert computed == request.num_tokens - 1, "a drained request has one token to go"
        states = groups.states(request_id, computed)
        return Suspended(request, tail(groups.tables(request_id), computed, done, states))

    def resume(self, request_id: str) -> None:
        """Ends a pending wait and puts a suspended request back. Idempotent."""
        if (waiter := self.migration.waiters.pop(request_id, None)) is not None:
            waiter.answer(SourceGoneError(RefusalCode.CANCELLED, "the migration was given up"))
        request = self.migration.suspended.pop(request_id, None)
        self._hold_slots()
        if request is not None:
            self.running.insert(0, request)  # before prompts in progress, and not the first to be preempted

    def keep(self, request_id: str) -> None:
        """Ends what a migration of the request, out of here or to here, could still do to it. Idempotent."""
        self.resume(request_id)
        self.migration.arrived.pop(request_id, None)

    def release(self, request_id: str) -> bool:
        """Frees a suspended request without output: it lives elsewhere now. Idempotent.

        Returns: whether it was suspended here.
        """
        if (request := self.migration.suspended.get(request_id)) is None:
            return False
        request.status = RequestStatus.FINISHED_ABORTED
        self._free_request(request)
        return True

    # ---- destination

    def reserve(self, migration_id: str, request: Request) -> Reservation:
        """Holds blocks and a slot for a request; the scheduler does not see it.

        Raises:
            DestinationRefusedError: nothing is held.
        """
        held = len(self.running) + len(self.migration.suspended) + len(self.migration.arriving)
        held += len(self.kv_holding_waiting)  # committed, and in the batch from the next step on
        if held >= min(self.max_active, self.max_num_running_reqs):
            text = f"all {held} slots of the batch are taken"
            raise DestinationRefusedError(RefusalCode.NO_BATCH_SLOT, text)
        request.prefill_stats = None  # the source has reported them
        request.status = entry_status(self)
        manager, groups = self.kv_cache_manager, self.cache_groups
        computed, num_local, _ = manager.get_computed_blocks(request)
        if num_local % self.block_size:
            computed, num_local = manager.empty_kv_cache_blocks, 0
        # Computed at its commit at least; what is behind a window then is not needed. Not so the slack.
        sure, slack = request.num_tokens - 1, slack_tokens(self.block_size)
        with groups.filled_by_copy(request.request_id):
            allocated = manager.allocate_slots(
                request,
                1 + slack,
                num_new_computed_tokens=num_local,
                new_computed_blocks=groups.without_states(computed),
                num_lookahead_tokens=self.num_lookahead_tokens,
                num_external_computed_tokens=sure - num_local,
                delay_cache_blocks=True,
                reserved_blocks=self._inflight_prefill_reserved_blocks(),
            )
        if allocated is None:
            text = f"no {groups.num_blocks_for([request.num_tokens + slack])} free KV blocks"
            raise DestinationRefusedError(RefusalCode.NO_FREE_BLOCKS, text)
        states = groups.hold_states(request.request_id)
        self.migration.arriving[migration_id] = request
        self._hold_slots()
        return Reservation(groups.table_ids(request.request_id), states, num_local)

    def grow(self, migration_id: str, num_tokens: int) -> list[list[int]]:
        """Raises: DestinationRefusedError: no free blocks; the reservation stays as it was."""
        request_id, groups = self.arriving_request(migration_id).request_id, self.cache_groups
        if (missing := groups.num_missing(request_id, num_tokens)) > 0:
            with groups.filled_by_copy(request_id):
                free = self.kv_cache_manager.block_pool.get_num_free_blocks()
                free -= self._inflight_prefill_reserved_blocks()
                if missing > free:
                    text = f"{missing} more KV blocks are needed, {free} are free"
                    raise DestinationRefusedError(RefusalCode.NO_FREE_BLOCKS, text)
                groups.grow(request_id, num_tokens)
        return groups.table_ids(request_id)

    def commit(self, migration_id: str, num_computed_tokens: int) -> Request:
        """Lets a reserved request, whose tokens are complete by now, enter the next batch.

        Its blocks stay out of the prefix cache until `publish`.
        """
        request = self.arriving_request(migration_id)
        self.grow(migration_id, request.num_tokens)
        del self.migration.arriving[migration_id]
        self.cache_groups.complete(request.request_id, num_computed_tokens)
        request.num_computed_tokens = num_computed_tokens
        request.status = entry_status(self)
        self.migrated_blocks.hold_back(request)
        self.requests[request.request_id] = request
        self.migration.arrived[request.request_id] = migration_id
        self.kv_holding_waiting.prepend_request(request)  # the slot is its own
        self._hold_slots()
        return request

    def publish(self, migration_id: str) -> None:
        """The blocks of a committed request are confirmed. Idempotent."""
        if (request_id := self._arrived_by(migration_id)) is not None:
            self.migrated_blocks.confirm(self.requests[request_id])

    def drop(self, migration_id: str) -> str | None:
        """Undoes what a migration brought. Idempotent.

        Returns: the id of the request if it was here, arriving or committed.
        """
        request: Request | None = self.migration.arriving.pop(migration_id, None)
        if request is not None:
            self.kv_cache_manager.free(request)
            self._hold_slots()
            return request.request_id
        request_id = self._arrived_by(migration_id)
        if request_id is not None:
            self.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        return request_id

    def arriving_request(self, migration_id: str) -> Request:
        """Raises: DestinationRefusedError: nothing is reserved for this migration."""
        if (request := self.migration.arriving.get(migration_id)) is None:
            text = "nothing is reserved for this migration"
            raise DestinationRefusedError(RefusalCode.UNKNOWN_MIGRATION, text)
        return request

    def _arrived_by(self, migration_id: str) -> str | None:
        """The id of the request that a migration has brought here."""
        arrived = self.migration.arrived.items()
        return next((request_id for request_id, brought_by in arrived if brought_by == migration_id), None)


def entry_status(scheduler: Any) -> RequestStatus:
    """The status of a request that enters one of vLLM's schedulers with output tokens.

    V2 runners take prompt and outputs from NewRequestData, so the request is new to them. V1 runners find the
    state that `worker.install_request` has put there, as after a preemption.
    """
    return RequestStatus.WAITING if scheduler.use_v2_model_runner else RequestStatus.PREEMPTED


def _is_prefilling(request: Request) -> bool:
    return bool(request.is_prefill_chunk)


class MigratingScheduler(MigrationMixin, StepTimer, Scheduler):
    """vLLM's scheduler for engines that run one step at a time (CPU, or async scheduling off)."""


class MigratingAsyncScheduler(MigrationMixin, StepTimer, AsyncScheduler):
    """vLLM's scheduler for engines that schedule a step ahead (the default on GPUs)."""
