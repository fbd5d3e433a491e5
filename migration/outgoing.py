"""Driver of the source's side: turns messages and engine answers into events, and performs the actions."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from migration.errors import Refusal, RefusalCode, SourceGoneError
from migration.local_instance import LocalInstance
from migration.messages import (
    Committed,
    Confirmed,
    CopyStage,
    Dropped,
    Final,
    FinalState,
    InstanceId,
    KeepAlive,
    KvPart,
    MigrationId,
    Offer,
    Pull,
    Query,
    Refused,
    RequestDescription,
    RequestId,
    Stage,
    ToSource,
    Withdraw,
)
from migration.record import MigrationRecord
from migration.source_table import SOURCE_TABLE, SourceAction, SourceEvent, SourceState
from migration.state_machine import StateMachine
from migration.tasks import Timer

logger = logging.getLogger(__name__)


class OutgoingMigration:
    """One request that is being moved from here to `destination`.

    Args:
        blocking: Suspend at once and copy everything then: the baseline for comparison.
    """

    def __init__(
        self,
        migration_id: MigrationId,
        description: RequestDescription,
        destination: InstanceId,
        reason: str,
        *,
        instance: LocalInstance,
        on_close: Callable[["OutgoingMigration"], None],
        blocking: bool = False,
    ) -> None:
        self.migration_id = migration_id
        self.description = description
        self.destination = destination
        self.reason = reason
        self.ended: asyncio.Future[MigrationRecord] = asyncio.get_running_loop().create_future()
        self.state_machine = StateMachine(SOURCE_TABLE, SourceState.OFFERED)
        self._instance, self._engine = instance, instance.engine
        self._on_close = on_close
        self._max_stages = 0 if blocking else instance.bounds.max_stages
        self._loop = asyncio.get_running_loop()
        self._timer = Timer(self._on_timer)
        self._part: KvPart | None = None
        self._final: FinalState | None = None
        self._tokens_done = 0
        self._stages = 0
        self._began_at = self._loop.time()
        self._stage_at: float | None = None
        self._copies: list[CopyStage] = []
        self._bytes_copied = 0
        self._questions = 0
        self._final_at = 0.0
        self._suspended_ms = 0.0
        self._refusal: Refusal | None = None
        self._peer_is_gone = False
        offer = Offer(migration_id, reason, description, instance.transport.endpoint())
        instance.send(destination, offer)
        self._arm_timer()

    @property
    def request_id(self) -> RequestId:
        return self.description.request_id

    @property
    def may_be_read(self) -> bool:
        """Whether blocks were offered to a destination that may still read them."""
        return self._stages > 0 and not self._peer_is_gone

    def on_message(self, message: ToSource) -> None:
        self._peer_is_gone = isinstance(message, Dropped)  # nothing is held there
        match message:
            case Pull(tokens_done=tokens_done):
                if self._part is not None:
                    self._stage_copied(self._part)
                self._tokens_done = tokens_done
                self.on_event(SourceEvent.PULLED)
            case Refused(refusal=refusal):
                self.on_event(SourceEvent.REFUSED, refusal.prefixed("refused"))
            case Committed(bytes_copied=bytes_copied):
                self._bytes_copied = bytes_copied
                if self._final is not None:
                    self._stage_copied(self._final.tail)
                self.on_event(SourceEvent.ACKNOWLEDGED)
            case Dropped(refusal=refusal):
                self.on_event(SourceEvent.DROPPED, refusal.prefixed("dropped by the destination"))

    def close(self) -> None:
        """Disarms the timer: the instance stops. The coordinator cancels the tasks."""
        self._timer.set(None)
        self.ended.cancel()

    def on_event(self, event: SourceEvent, refusal: Refusal | None = None) -> None:
        """Handles one event; the first `refusal` is the reason if the migration ends without commit."""
        self._refusal = self._refusal or refusal
        self._peer_is_gone |= event is SourceEvent.PEER_LOST
        before = self.state_machine.state
        actions = self.state_machine.handle(event)
        if self.state_machine.state is not before or event is SourceEvent.TIMED_OUT:
            self._arm_timer()
        for action in actions:
            self._perform(action)

    def _why(self) -> Refusal:
        return self._refusal or Refusal(RefusalCode.CANCELLED, "withdrawn")

    def _perform(self, action: SourceAction) -> None:
        match action:
            case SourceAction.ADVANCE:
                self._instance.tasks.start(self._advance())
            case SourceAction.SEND_STAGE:
                assert self._part is not None
                self._stages += 1
                self._stage_at = self._loop.time()
                self._instance.send(self.destination, Stage(self.migration_id, self._part))
            case SourceAction.SEND_FINAL:
                assert self._final is not None
                self._instance.send(self.destination, Final(self.migration_id, self._final))
            case SourceAction.SEND_KEEP_ALIVE:
                self._instance.send(self.destination, KeepAlive(self.migration_id))
            case SourceAction.SEND_QUERY:
                self._questions += 1
                self._instance.send(self.destination, Query(self.migration_id))
            case SourceAction.SEND_WITHDRAW:
                self._instance.send(self.destination, Withdraw(self.migration_id, self._why()))
            case SourceAction.SEND_CONFIRMED:
                self._instance.send(self.destination, Confirmed(self.migration_id))
            case SourceAction.RESUME:
                # Once the final state is out the destination may run as epoch + 1: outrank it.
                epoch = self.description.epoch if self._final is None else self._final.epoch + 2
                resume = self._engine.resume(self.request_id, epoch)
                self._instance.tasks.start(self._finish_in_engine(resume))
            case SourceAction.RELEASE:
                self._suspended_ms = (self._loop.time() - self._final_at) * 1e3
                self._instance.tasks.start(self._finish_in_engine(self._release()))
            case SourceAction.CLOSE:
                self._close()

    async def _advance(self) -> None:
        try:
            answer = await self._engine.next_stage(
                self.request_id,
                self.description.incarnation,
                self._tokens_done,
                suspend=self._stages >= self._max_stages,
                reader=self.migration_id,
            )
        except SourceGoneError as error:
            if self.state_machine.state is not SourceState.RETREATING:
                self.on_event(SourceEvent.GONE, error.refusal)
            return
        if isinstance(answer, FinalState):
            self._final = answer
            self._stages += 1
            self._final_at = self._stage_at = self._loop.time()
            self.on_event(SourceEvent.SUSPENDED)
        else:
            self._part = answer
            self.on_event(SourceEvent.STAGE_READY)

    async def _finish_in_engine(self, call: Coroutine[Any, Any, None]) -> None:
        await call
        self.on_event(SourceEvent.ENGINE_DONE)

    async def _release(self) -> None:
        await self._engine.release(self.request_id)
        await self._engine.unpin(self.migration_id)

    def _stage_copied(self, part: KvPart) -> None:
        """Records a stage when the destination first reports it as copied."""
        if self._stage_at is not None:
            begin, end = self._stage_at - self._began_at, self._loop.time() - self._began_at
            self._copies.append(CopyStage(begin, end, len(part.block_ids)))
            self._stage_at = None

    def _arm_timer(self) -> None:
        bounds = self._instance.bounds
        bound_s = {
            SourceState.OFFERED: bounds.reply_s,
            SourceState.ADVANCING: bounds.keep_alive_s,
            SourceState.STAGING: bounds.copy_s,
            SourceState.SUSPENDED: bounds.acknowledge_s,
            SourceState.ASKING: bounds.acknowledge_s,
        }.get(self.state_machine.state)
        self._timer.set(bound_s)

    def _on_timer(self) -> None:
        state = self.state_machine.state
        deciding = state in (SourceState.SUSPENDED, SourceState.ASKING)
        if deciding and self._questions >= self._instance.bounds.questions:
            text = f"no commit after {self._questions} questions about it"
            self.on_event(SourceEvent.GAVE_UP, Refusal(RefusalCode.TIMED_OUT, text))
        elif deciding or state is SourceState.ADVANCING:
            self.on_event(SourceEvent.TIMED_OUT)  # asks again; the migration goes on
        else:
            text = f"no answer in time while {state}"
            self.on_event(SourceEvent.TIMED_OUT, Refusal(RefusalCode.TIMED_OUT, text))

    def _close(self) -> None:
        self._timer.set(None)
        committed = self.state_machine.state is SourceState.COMMITTED
        final = self._final
        record = MigrationRecord(
            request_id=self.request_id,
            source=self._instance.name,
            destination=self.destination,
            reason=self.reason,
            refusal=None if committed else self._why(),
            stages=self._stages,
            blocks=sum(copy.blocks for copy in self._copies),
            tokens=final.num_computed_tokens if final else 0,
            suspended_ms=self._suspended_ms,
            duration_s=self._loop.time() - self._began_at,
            bytes_copied=self._bytes_copied,
            copies=tuple(self._copies),
        )
        self.ended.set_result(record)
        self._on_close(self)
