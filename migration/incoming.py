"""Driver of the destination's side: reserves, pulls blocks stage by stage, commits."""

import asyncio
import itertools
import logging
import sys
from collections.abc import Callable

from migration.destination_table import (
    DESTINATION_TABLE,
    DestinationAction,
    DestinationEvent,
    DestinationState,
)
from migration.errors import DestinationRefusedError, PeerLostError, Refusal, RefusalCode
from migration.local_instance import LocalInstance
from migration.messages import (
    NO_BLOCK,
    BlockRun,
    Committed,
    Confirmed,
    Dropped,
    Final,
    FinalState,
    InstanceId,
    KeepAlive,
    KvPart,
    Offer,
    Pull,
    Query,
    Refused,
    RequestId,
    Stage,
    ToDestination,
    Withdraw,
)
from migration.state_machine import StateMachine
from migration.tasks import Timer

logger = logging.getLogger(__name__)

#: What a paced copy moves at a time.
SLICE_BYTES = 2 * 2**20

_COPY_STATES = (DestinationState.COPYING, DestinationState.TAIL)


class IncomingMigration:
    """One request that is being moved to this instance."""

    def __init__(
        self,
        offer: Offer,
        source: InstanceId,
        instance: LocalInstance,
        on_close: Callable[["IncomingMigration"], None],
    ) -> None:
        self.migration_id = offer.migration_id
        self.source = source
        self.state_machine = StateMachine(DESTINATION_TABLE, DestinationState.RESERVING)
        self.bytes_copied = 0
        self.was_refused = False
        self.ended = asyncio.Event()
        self._offer = offer
        self._instance = instance
        self._on_close = on_close
        self._timer = Timer(self._on_timer)
        self._tables: list[list[int]] = []
        self._states: list[int] = []
        self._copied: list[int] = []  # end of the blocks that have been copied, by cache group
        self._tokens_done = 0
        self._block_bytes = 0
        self._part: KvPart | None = None
        self._final: FinalState | None = None
        self._copy: asyncio.Task[None] | None = None
        self._refusal: Refusal | None = None
        self._closed = False
        instance.tasks.start(self._reserve())

    @property
    def request_id(self) -> RequestId:
        return self._offer.request.request_id

    @property
    def holds_resources(self) -> bool:
        return self.state_machine.state not in (DestinationState.COMMITTED, DestinationState.ENDED)

    def on_message(self, message: ToDestination) -> None:
        match message:
            case Stage(part=part):
                if self.state_machine.state is DestinationState.WAITING:
                    self._part = part
                self.on_event(DestinationEvent.STAGE)
            case Final(state=state):
                if self.state_machine.state is DestinationState.WAITING:
                    self._part, self._final = state.tail, state
                self.on_event(DestinationEvent.FINAL)
            case KeepAlive():
                self.on_event(DestinationEvent.KEEP_ALIVE)
            case Withdraw(refusal=refusal):
                self.on_event(DestinationEvent.WITHDRAWN, refusal.prefixed("withdrawn"))
            case Confirmed():
                self.on_event(DestinationEvent.CONFIRMED)
            case Query():
                self.on_event(DestinationEvent.QUERIED)
            case Offer():
                logger.warning("migration %s: offered twice, ignored", self.migration_id)

    def close(self) -> None:
        """Disarms the timer: the instance stops. The coordinator cancels the tasks."""
        self._closed = True
        self._timer.set(None)

    def on_event(self, event: DestinationEvent, refusal: Refusal | None = None) -> None:
        """Handles one event; the first `refusal` is the reason if the migration ends without commit."""
        self._refusal = self._refusal or refusal
        before = self.state_machine.state
        actions = self.state_machine.handle(event)
        if self.state_machine.state is not before or before not in _COPY_STATES:
            self._arm_timer()
        for action in actions:
            self._perform(action)

    def _why(self) -> Refusal:
        return self._refusal or Refusal(RefusalCode.UNKNOWN_MIGRATION, "nothing is held here")

    def _perform(self, action: DestinationAction) -> None:
        match action:
            case DestinationAction.SEND_PULL:
                self._instance.send(self.source, Pull(self.migration_id, self._tokens_done))
            case DestinationAction.SEND_REFUSED:
                self.was_refused = True
                self._instance.send(self.source, Refused(self.migration_id, self._why()))
            case DestinationAction.SEND_COMMITTED:
                self._instance.send(self.source, Committed(self.migration_id, self.bytes_copied))
            case DestinationAction.SEND_DROPPED:
                self._instance.send(self.source, Dropped(self.migration_id, self._why()))
            case DestinationAction.COPY:
                assert self._part is not None
                self._copy = self._instance.tasks.start(self._copy_part(self._part))
                self._copy.add_done_callback(self._copy_ended)
            case DestinationAction.STOP_COPY:
                assert self._copy is not None
                self._copy.cancel()
            case DestinationAction.COMMIT:
                self._instance.tasks.start(self._commit())
            case DestinationAction.PUBLISH:
                self._instance.tasks.start(self._instance.engine.publish(self.migration_id))
            case DestinationAction.DROP:
                self._instance.tasks.start(self._drop())
            case DestinationAction.CLOSE:
                self._close()

    async def _reserve(self) -> None:
        try:
            reservation = await self._instance.engine.reserve(self.migration_id, self._offer.request)
        except DestinationRefusedError as error:
            self.on_event(DestinationEvent.REFUSED, error.refusal)
            return
        self._tables, self._states = reservation.tables, reservation.states
        self._copied = [0] * len(self._tables)
        self._tokens_done = reservation.tokens_present
        self.on_event(DestinationEvent.RESERVED)

    async def _copy_part(self, part: KvPart) -> None:
        """Copies what is offered beyond what is here already. Cancellation waits for the transport."""
        loop = asyncio.get_running_loop()
        began_at, is_tail = loop.time(), self.state_machine.state is DestinationState.TAIL
        try:
            if any(run.end > len(table) for run, table in self._by_group(part)):
                self._tables = await self._instance.engine.grow(self.migration_id, part.end)
            pairs = self._block_pairs(part)
            while pairs:
                size = self._slice_blocks()
                now, pairs = pairs[:size], pairs[size:]
                copied = await self._instance.read(
                    self.source,
                    self._offer.kv_endpoint,
                    [theirs for theirs, _ in now],
                    [ours for _, ours in now],
                )
                self._block_bytes = max(1, copied // len(now))
                self.bytes_copied += copied
                if self.state_machine.state is DestinationState.COPYING:
                    await self._instance.pacer.copied(copied)
        except (PeerLostError, DestinationRefusedError) as error:
            self.on_event(DestinationEvent.COPY_FAILED, error.refusal)
            return
        if is_tail and loop.time() - began_at > self._instance.bounds.tail_s:
            # This process stood still, and the timer has not been served yet: the source gave up long ago.
            text = "the last blocks were read too late"
            self.on_event(DestinationEvent.COPY_FAILED, Refusal(RefusalCode.TIMED_OUT, text))
        else:
            # A partly filled tail block is only ever the end of a final state.
            self._copied = [max(run.end, copied) for run, copied in zip(part.runs, self._copied, strict=True)]
            self._tokens_done = max(self._tokens_done, part.end)
            self.on_event(DestinationEvent.COPIED)

    def _by_group(self, part: KvPart) -> list[tuple[BlockRun, list[int]]]:
        """The run and the table of each cache group. Raises: PeerLostError: the source has other groups."""
        num_states = len(self._states) if self.state_machine.state is DestinationState.TAIL else 0
        if (len(part.runs), len(part.states)) != (len(self._tables), num_states):
            raise PeerLostError(f"{self.source} offers blocks of other cache groups than those here")
        return list(zip(part.runs, self._tables, strict=True))

    def _block_pairs(self, part: KvPart) -> list[tuple[int, int]]:
        """What to copy: blocks of the source, each with the block here that it is for."""
        pairs: list[tuple[int, int]] = []
        for (run, table), copied in zip(self._by_group(part), self._copied, strict=True):
            begin = max(run.first, copied)
            pairs += zip(run.block_ids[begin - run.first :], table[begin : run.end], strict=False)
        if part.states:
            pairs += zip(part.states, self._states, strict=True)
        return [pair for pair in pairs if NO_BLOCK not in pair]

    def _slice_blocks(self) -> int:
        """Blocks to copy at once. The tail is never divided: its request waits for it."""
        if self.state_machine.state is not DestinationState.COPYING or not self._instance.pacer.paces:
            return sys.maxsize
        return max(1, SLICE_BYTES // self._block_bytes) if self._block_bytes else 1

    @property
    def _local_blocks(self) -> list[int]:
        """All blocks that are reserved here."""
        return [*itertools.chain.from_iterable(self._tables), *self._states]

    def _copy_ended(self, copy: "asyncio.Task[None]") -> None:
        """Reports a copy that was cancelled, perhaps before its first step, or failed unexpectedly."""
        if self._closed:
            return
        if copy.cancelled():
            self.on_event(DestinationEvent.COPY_FAILED, Refusal(RefusalCode.CANCELLED, "stopped"))
        elif copy.exception() is not None:
            refusal = Refusal(RefusalCode.COPY_FAILED, repr(copy.exception()))
            self.on_event(DestinationEvent.COPY_FAILED, refusal)

    async def _commit(self) -> None:
        assert self._final is not None
        try:
            await self._instance.engine.commit(self.migration_id, self._final)
        except DestinationRefusedError as error:
            self.on_event(DestinationEvent.COMMIT_FAILED, error.refusal)
        else:
            logger.debug("request %s: has come from %s", self.request_id, self.source)
            self.on_event(DestinationEvent.ENTERED)

    async def _drop(self) -> None:
        if self._instance.transport.quarantine.holds(self._local_blocks):
            self._instance.tasks.start(self._drop_when_quiet())  # the source need not wait for that
        else:
            await self._instance.engine.drop(self.migration_id)
        self.on_event(DestinationEvent.ENGINE_DONE)

    async def _drop_when_quiet(self) -> None:
        await self._instance.transport.quarantine.wait_for(self._local_blocks)
        await self._instance.engine.drop(self.migration_id)

    def _arm_timer(self) -> None:
        """Every message from the source renews the lease, but not the bound of a copy."""
        bounds = self._instance.bounds
        bound_s = {
            DestinationState.WAITING: bounds.lease_s,
            DestinationState.COPYING: bounds.copy_s,
            DestinationState.TAIL: bounds.tail_s,
            DestinationState.COMMITTED: bounds.log_s,
        }.get(self.state_machine.state)
        self._timer.set(bound_s)

    def _on_timer(self) -> None:
        refusal = Refusal(RefusalCode.TIMED_OUT, f"lease ended while {self.state_machine.state}")
        self.on_event(DestinationEvent.TIMED_OUT, refusal)

    def _close(self) -> None:
        self._timer.set(None)
        self.ended.set()
        self._on_close(self)
