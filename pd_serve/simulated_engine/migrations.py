"""Sequences on their way into a simulated engine and out of it."""

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass

from migration.engine_rules import BlockTable, mismatch, next_stage, should_suspend, slack_tokens, tail
from migration.errors import DestinationRefusedError, RefusalCode, SourceGoneError
from migration.messages import FinalState, KvPart, RequestDescription, RequestId
from migration.reservation import Reservation
from migration.tasks import settle
from pd_serve.simulated_engine.batcher import Batcher
from pd_serve.simulated_engine.sequence import Sequence


@dataclass(slots=True)
class PendingStage:
    """A migration that waits for its next stage; see `Engine.next_stage`."""

    sequence: Sequence | None
    incarnation: int
    tokens_done: int
    suspend: bool
    reader: str
    answer: "asyncio.Future[KvPart | FinalState]"


class SequenceMigrations:
    """The migrations of one engine. Everything here happens between two steps.

    Args:
        sequences: The engine's requests by id, arriving ones excepted.
        is_in_flight: Whether a sequence is in a step that has not ended.

    Attributes:
        suspended: Sequences out of the batch, by request id.
        arriving: Reserved sequences by migration id.
        arrived: Migration id by request id, once committed.
        pinned: Blocks that a peer may be reading, by migration id.
    """

    def __init__(
        self, batcher: Batcher, sequences: dict[str, Sequence], is_in_flight: Callable[[Sequence], bool]
    ) -> None:
        self.suspended: dict[str, Sequence] = {}
        self.arriving: dict[str, Sequence] = {}
        self.arrived: dict[str, str] = {}
        self.pinned: dict[str, list[int]] = {}
        self._waiters: dict[str, PendingStage] = {}
        self._batcher = batcher
        self._sequences = sequences
        self._is_in_flight = is_in_flight

    @property
    def compatibility(self) -> dict[str, str]:
        """What has to be equal at both ends of a migration."""
        return {"block size": str(self._batcher.settings.block_tokens)}

    @property
    def held_slots(self) -> int:
        """Slots of the batch kept for sequences that may come back or enter."""
        return len(self.suspended) + len(self.arriving)

    @property
    def asked_for_stage(self) -> list[Sequence]:
        """The sequences whose migrations wait for the next boundary."""
        return [waiter.sequence for waiter in self._waiters.values() if waiter.sequence is not None]

    def forget(self, request_id: str) -> None:
        """A request has ended, or left."""
        self.suspended.pop(request_id, None)
        self.arrived.pop(request_id, None)

    # ---- source

    def describe(self, request_id: RequestId) -> RequestDescription:
        """Raises: SourceGoneError: not running here."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            raise SourceGoneError(RefusalCode.NOT_HERE, "the request is not here")
        if sequence not in self._batcher.running:
            text = "the request is not running (waiting, preempted or suspended)"
            raise SourceGoneError(RefusalCode.NOT_RUNNING, text)
        return RequestDescription(
            request_id=request_id,
            payload=sequence.payload,
            client=sequence.client,
            epoch=sequence.epoch,
            incarnation=sequence.preemptions,
            output_token_ids=list(sequence.output),
            num_prompt_tokens=sequence.prompt_tokens,
            max_total_tokens=sequence.prompt_tokens + sequence.max_tokens,
            compatibility=self.compatibility,
        )

    def wait_for_stage(self, request_id: str, waiter: PendingStage) -> None:
        """Settles its `answer` at the first boundary that has one."""
        assert request_id not in self._waiters, "only one call per request at a time"
        self._waiters[request_id] = waiter

    def settle_stages(self) -> None:
        for request_id, waiter in list(self._waiters.items()):
            answer = self._next_stage(request_id, waiter)
            if answer is not None:
                del self._waiters[request_id]
                if not isinstance(answer, SourceGoneError):
                    self.pin(waiter.reader, answer if isinstance(answer, KvPart) else answer.tail)
                settle(waiter.answer, answer)

    def pin(self, reader: str, part: KvPart) -> None:
        """Keeps blocks as they are for a peer that reads them. Its former ones have been read."""
        block_ids = part.block_ids
        self._batcher.pool.share(block_ids)
        self.unpin(reader)
        if block_ids:
            self.pinned[reader] = block_ids

    def unpin(self, reader: str) -> None:
        self._batcher.pool.release(self.pinned.pop(reader, []))

    def _next_stage(
        self, request_id: str, waiter: PendingStage
    ) -> KvPart | FinalState | SourceGoneError | None:
        sequence = waiter.sequence
        if sequence is None or self._sequences.get(request_id) is not sequence:
            return SourceGoneError(RefusalCode.FINISHED, "the request has finished")
        if sequence.preemptions != waiter.incarnation:
            return SourceGoneError(RefusalCode.PREEMPTED, "the request was preempted")
        block_tokens, done = self._batcher.settings.block_tokens, waiter.tokens_done
        tables = [BlockTable(block_tokens, sequence.blocks)]
        if request_id not in self.suspended:
            if not should_suspend(
                sequence.computed, block_tokens, done, decoding=sequence.is_decoding, suspend=waiter.suspend
            ):
                return next_stage(tables, sequence.computed, block_tokens, done)
            self._batcher.running.remove(sequence)
            self.suspended[request_id] = sequence
        if self._is_in_flight(sequence):
            return None
        return FinalState(
            tail=tail(tables, sequence.computed, done),
            epoch=sequence.epoch,
            output_token_ids=list(sequence.output),
            num_computed_tokens=sequence.computed,
        )

    def resume(self, request_id: str, epoch: int) -> None:
        if (waiter := self._waiters.pop(request_id, None)) is not None:
            settle(waiter.answer, SourceGoneError(RefusalCode.CANCELLED, "the migration was given up"))
        if (sequence := self.suspended.pop(request_id, None)) is not None:
            self._batcher.running.append(sequence)
        if (sequence := self._sequences.get(request_id)) is not None:
            sequence.epoch = max(sequence.epoch, epoch)

    def keep(self, request_id: str) -> None:
        """Ends what a migration of the request, out of here or to here, could still do to it."""
        self.resume(request_id, 0)
        self.forget(request_id)

    # ---- destination

    def reserve(self, migration_id: str, arriving: Sequence, request: RequestDescription) -> Reservation:
        """Raises: DestinationRefusedError: nothing is held."""
        batcher = self._batcher
        if (difference := mismatch(request.compatibility, self.compatibility)) is not None:
            raise DestinationRefusedError(RefusalCode.INCOMPATIBLE, difference)
        held = len(batcher.running) + self.held_slots
        if held >= batcher.settings.max_num_seqs:
            text = f"all {held} slots of the batch are taken"
            raise DestinationRefusedError(RefusalCode.NO_BATCH_SLOT, text)
        shared = batcher.cached(arriving)
        arriving.hashes.clear()
        block_tokens = batcher.settings.block_tokens
        missing = batcher.num_blocks(arriving.num_tokens + slack_tokens(block_tokens)) - len(shared)
        if missing > batcher.pool.num_free - batcher.pool.num_unused(shared):
            raise DestinationRefusedError(RefusalCode.NO_FREE_BLOCKS, f"no {missing} free KV blocks")
        batcher.pool.share(shared)
        arriving.blocks = shared + batcher.pool.allocate(missing)
        self.arriving[migration_id] = arriving
        return Reservation([list(arriving.blocks)], [], len(shared) * block_tokens)

    def arriving_sequence(self, migration_id: str) -> Sequence:
        """Raises: DestinationRefusedError: nothing is reserved for this migration."""
        if (sequence := self.arriving.get(migration_id)) is None:
            text = "nothing is reserved for this migration"
            raise DestinationRefusedError(RefusalCode.UNKNOWN_MIGRATION, text)
        return sequence

    def grow(self, migration_id: str, num_tokens: int) -> list[list[int]]:
        """Returns: its block tables. Raises: DestinationRefusedError: no free blocks."""
        sequence = self.arriving_sequence(migration_id)
        missing = self._batcher.num_blocks(num_tokens) - len(sequence.blocks)
        if missing > self._batcher.pool.num_free:
            raise DestinationRefusedError(RefusalCode.NO_FREE_BLOCKS, f"no {missing} more free KV blocks")
        sequence.blocks += self._batcher.pool.allocate(max(0, missing))
        return [list(sequence.blocks)]

    def commit(self, migration_id: str, state: FinalState) -> None:
        """Lets a reserved sequence enter the batch. Raises: DestinationRefusedError."""
        batcher, sequence = self._batcher, self.arriving_sequence(migration_id)
        self.grow(migration_id, sequence.prompt_tokens + len(state.output_token_ids))
        del self.arriving[migration_id]
        sequence.continue_after(state.output_token_ids)
        sequence.epoch = state.epoch + 1
        sequence.computed = state.num_computed_tokens
        assert sequence.is_decoding, "all tokens but the last one have their KV here"
        sequence.digest = batcher.read(sequence, sequence.computed)
        sequence.is_confirmed = False
        self.arrived[sequence.request_id] = migration_id
        self._sequences[sequence.request_id] = sequence
        batcher.running.append(sequence)

    def publish(self, migration_id: str) -> None:
        sequence = self._arrived_by(migration_id)
        if sequence is not None and not sequence.is_confirmed:
            sequence.is_confirmed = True
            if self._batcher.settings.prefix_caching:
                self._batcher.publish(sequence)

    def drop(self, migration_id: str) -> Sequence | None:
        """Gives a reservation back. Returns the sequence if it was committed: it has to be ended."""
        if (arriving := self.arriving.pop(migration_id, None)) is not None:
            self._batcher.release(arriving)
            return None
        return self._arrived_by(migration_id)

    def _arrived_by(self, migration_id: str) -> Sequence | None:
        """The committed sequence that a migration has brought here."""
        for request_id, brought_by in self.arrived.items():
            if brought_by == migration_id:
                return self._sequences[request_id]
        return None

    def check_integrity(self, under_way: Collection[str]) -> list[str]:
        """Entries of requests that are gone, and blocks that are pinned for migrations not under way."""
        problems = [
            f"{len(blocks)} blocks are pinned for {reader}"
            for reader, blocks in self.pinned.items()
            if reader not in under_way
        ]
        if not set(self.arrived) <= set(self._sequences):
            problems.append(f"ended requests are remembered as arrivals: {sorted(self.arrived)}")
        for name, table in (
            ("suspended", self.suspended),
            ("arriving", self.arriving),
            ("asked for a stage", self._waiters),
        ):
            if table and not self._sequences:
                problems.append(f"still {name} at rest: {sorted(table)}")
        return problems
