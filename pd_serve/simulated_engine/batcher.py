"""A simulated engine's own scheduler: continuous batching over paged blocks, without a clock or a loop.

`schedule` decides a step and holds its blocks; `apply` writes the KV of its tokens and says the next ones.
"""

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from migration.engine_interface import HeldBlocks
from migration.messages import RequestId
from pd_serve.simulated_engine.block_pool import BlockPool
from pd_serve.simulated_engine.contents import _NEXT, _POSITION, _TOKEN, MASK, Prompt, kv_of, token_after
from pd_serve.simulated_engine.settings import EngineSettings


class Sequence:
    """One request in an engine.

    Attributes:
        output: Tokens generated so far, by any owner; `emitted` of them have been handed to the client.
        computed: Tokens whose KV is in `blocks`. A decoding sequence has all but the last one.
        digest: Sum over the contents of its blocks, as last read.
        epoch: Ownership epoch.
        rank: Arrival time of the request: within a priority, the latest is preempted first.
        added_at, begun_at: When this engine got it, and when the first step with a part of its prompt began.
        hashes: Of its full blocks so far, each made of all contents up to there (prefix caching only).
    """

    __slots__ = (
        "added_at",
        "begun_at",
        "blocks",
        "client",
        "computed",
        "digest",
        "emitted",
        "epoch",
        "hashes",
        "max_tokens",
        "output",
        "payload",
        "preempted_at",
        "preemptions",
        "priority",
        "prompt",
        "prompt_tokens",
        "queue_key",
        "rank",
        "request_id",
        "wants_handoff",
    )

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        max_tokens: int,
        priority: int,
        rank: float,
        payload: list[bytes],
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_tokens = prompt.num_tokens
        self.max_tokens = max_tokens
        self.priority = priority
        self.rank = rank
        self.payload = payload
        self.client = ""
        self.epoch = 0
        self.output: list[int] = []
        self.emitted = 0
        self.computed = 0
        self.digest = 0
        self.blocks: list[int] = []
        self.hashes: list[int] = []
        self.preemptions = 0
        self.preempted_at: float | None = None
        self.wants_handoff = False
        self.added_at = 0.0
        self.begun_at: float | None = None
        self.queue_key: tuple[int, int, float] = (priority, 1, rank)

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + len(self.output)

    @property
    def is_decoding(self) -> bool:
        return bool(self.output) and self.computed == self.num_tokens - 1

    def times(self, now: float) -> tuple[float, float]:
        """Seconds that it has waited here, and since then."""
        begun_at = self.added_at if self.begun_at is None else self.begun_at
        return begun_at - self.added_at, now - begun_at

    def content(self, block: int, num_tokens: int, block_tokens: int) -> int:
        """What block number `block` holds with its first `num_tokens` tokens computed."""
        first = block * block_tokens
        of_prompt = min(num_tokens, max(0, self.prompt_tokens - first))
        value = self.prompt.content(block, of_prompt, block_tokens) if of_prompt else 0
        for position in range(first + of_prompt, first + num_tokens):
            value += kv_of(position, self.output[position - self.prompt_tokens])
        return value & MASK


def held_blocks(here: Iterable[Sequence], arriving: Iterable[Sequence]) -> list[HeldBlocks]:
    """How many blocks each of these sequences holds, if any."""
    known = [(sequence, False) for sequence in here] + [(sequence, True) for sequence in arriving]
    return [HeldBlocks(RequestId(s.request_id), len(s.blocks), comes) for s, comes in known if s.blocks]


@dataclass(frozen=True, slots=True)
class Step:
    """Prompts' chunks (sequence, tokens), and sequences that get one token each."""

    chunks: list[tuple[Sequence, int]]
    decodes: list[Sequence]
    duration_s: float

    def begin(self, now: float) -> None:
        for sequence, _ in self.chunks:
            if sequence.begun_at is None:
                sequence.begun_at = now


class Batcher:
    """Args: `on_prefill_started` is told of sequences that ask for a hand-off, in the step of their start.

    Attributes:
        waiting: In the order of their turn: by priority, preempted ones first, then by arrival.
        running: The batch.
        held_slots: Slots of the batch kept for suspended and arriving requests.
        preemption_loss_s: Time from preemption to the end of the recompute, summed up.
    """

    def __init__(
        self, settings: EngineSettings, on_prefill_started: Callable[[list[Sequence]], None]
    ) -> None:
        self.settings = settings
        self.pool = BlockPool(settings.num_blocks)
        self.watermark_blocks = int(settings.watermark * settings.num_blocks)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.held_slots = 0
        self.waiting_blocks = 0
        self.waiting_tokens = 0
        self.num_preempted = 0
        self.preemptions = 0
        self.preemption_loss_s = 0.0
        self._on_prefill_started = on_prefill_started
        self._heads = 0

    # ---- the queue

    def enqueue(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.queue_key)
        self._count(sequence, 1)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out of queue and batch and gives its blocks back. Idempotent."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            self._count(sequence, -1)
        self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.settings.block_tokens)

    def _count(self, sequence: Sequence, sign: int) -> None:
        self.waiting_blocks += sign * self.num_blocks(sequence.num_tokens)
        self.waiting_tokens += sign * sequence.num_tokens
        self.num_preempted += sign * (sequence.preempted_at is not None)

    # ---- deciding

    def schedule(self, now: float) -> Step | None:
        """The next step, or None if there is nothing to do."""
        model = self.settings.cost_model
        if self.settings.chunk_tokens is None:
            chunks = self._admit(self.settings.max_prefill_tokens, whole=True)
            if chunks:
                lengths = [(n, sequence.computed) for sequence, n in chunks]
                return Step(chunks, [], model.prefill_s(lengths))
            self._make_room(self.running, now)
            decodes = self.running.copy()
            if not decodes:
                return None
            return Step([], decodes, model.decode_s(len(decodes), sum([s.computed for s in decodes])))
        decodes = [sequence for sequence in self.running if sequence.is_decoding]
        self._make_room(decodes, now)
        decodes = [sequence for sequence in self.running if sequence.is_decoding]
        chunks = self._chunks(self.settings.chunk_tokens - len(decodes))
        if not decodes and not chunks:
            return None
        lengths = [(n, sequence.computed) for sequence, n in chunks]
        context = sum([s.computed for s in decodes])
        return Step(chunks, decodes, model.mixed_s(lengths, len(decodes), context))

    def _make_room(self, decodes: Iterable[Sequence], now: float) -> None:
        """Gives every decoding sequence a place for its next token, preempting others if need be."""
        block_tokens, pool = self.settings.block_tokens, self.pool
        for sequence in [s for s in decodes if s.computed == len(s.blocks) * block_tokens]:
            while sequence in self.running:
                if pool.num_free:
                    sequence.blocks += pool.allocate(1)
                    break
                self._preempt(max(self.running, key=lambda s: (s.priority, s.rank)), now)

    def _preempt(self, sequence: Sequence, now: float) -> None:
        self.running.remove(sequence)
        self.release(sequence)
        sequence.computed = 0
        sequence.hashes.clear()
        sequence.preemptions += 1
        sequence.preempted_at = now
        self.preemptions += 1
        self._heads -= 1
        sequence.queue_key = (sequence.priority, 0, self._heads)
        self.enqueue(sequence)

    def _chunks(self, budget: int) -> list[tuple[Sequence, int]]:
        chunks = []
        for sequence in self.running:
            if budget > 0 and not sequence.is_decoding:
                n = min(budget, sequence.num_tokens - sequence.computed)
                chunks.append((sequence, n))
                budget -= n
        return chunks + self._admit(budget, whole=False)

    def _admit(self, budget: int, *, whole: bool) -> list[tuple[Sequence, int]]:
        """Lets waiting requests into the batch, as far as blocks, slots and the token budget go.

        Args:
            whole: A prompt is computed in one step (a first one may exceed the budget), or by chunks.
        """
        if not self.waiting or (not whole and budget <= 0):
            return []
        chunks: list[tuple[Sequence, int]] = []
        started = []
        pool = self.pool
        slots = self.settings.max_num_seqs - self.held_slots
        while self.waiting and len(self.running) < slots and budget > 0:
            sequence = self.waiting[0]
            num_tokens = sequence.num_tokens
            shared = self._cached(sequence)
            missing = self.num_blocks(num_tokens) - len(shared)
            if pool.num_free - pool.num_unused(shared) - missing < self.watermark_blocks:
                break
            n = num_tokens - len(shared) * self.settings.block_tokens
            if whole and chunks and n > budget:
                break
            del self.waiting[0]
            self._count(sequence, -1)
            pool.share(shared)
            sequence.blocks = shared + pool.allocate(missing)
            sequence.computed = num_tokens - n
            self.running.append(sequence)
            chunks.append((sequence, n if whole else min(n, budget)))
            budget -= n
            if sequence.wants_handoff:
                sequence.wants_handoff = False
                started.append(sequence)
        if started:
            self._on_prefill_started(started)
        return chunks

    def _cached(self, sequence: Sequence) -> list[int]:
        """Blocks with the beginning of a sequence that is not in the batch; at least a token is left out."""
        if not self.settings.prefix_caching:
            return []
        full = (sequence.num_tokens - 1) // self.settings.block_tokens
        self.hash_blocks(sequence, full)
        shared = self.pool.cached(sequence.hashes)
        del sequence.hashes[len(shared) :]
        return shared

    def hash_blocks(self, sequence: Sequence, num_blocks: int) -> None:
        """Extends `hashes` to the first so many blocks, from the tokens that they should hold."""
        block_tokens, hashes = self.settings.block_tokens, sequence.hashes
        for block in range(len(hashes), num_blocks):
            before = hashes[-1] if hashes else 0
            hashes.append(hash((before, sequence.content(block, block_tokens, block_tokens))))

    # ---- doing

    def apply(self, step: Step, now: float) -> list[Sequence]:
        """Computes the step's tokens. Returns the sequences that have one more in their `output`."""
        spoken = [sequence for sequence, n in step.chunks if self._prefill(sequence, n, now)]
        content, block_tokens = self.pool.content, self.settings.block_tokens
        caching, (first, count) = self.settings.prefix_caching, self.settings.vocabulary
        for sequence in step.decodes:
            position = sequence.computed
            output = sequence.output
            kv = (output[-1] + _TOKEN) * (position * _POSITION + 1) & MASK
            block = sequence.blocks[position // block_tokens]
            sequence.computed = position + 1
            if position % block_tokens == 0 or len(output) + 1 >= sequence.max_tokens:
                content[block] = kv if position % block_tokens == 0 else (content[block] + kv) & MASK
                digest = self.read(sequence)
            else:
                content[block] = (content[block] + kv) & MASK
                digest = (sequence.digest + kv) & MASK
            sequence.digest = digest
            output.append(first + ((digest * _NEXT & MASK) >> 48) % count)
            if caching and (position + 1) % block_tokens == 0:
                self.publish(sequence)
            spoken.append(sequence)
        return spoken

    def _prefill(self, sequence: Sequence, num_tokens: int, now: float) -> bool:
        """Computes a chunk. Whether it was the last, so that a token has been said."""
        block_tokens, content = self.settings.block_tokens, self.pool.content
        end = sequence.computed + num_tokens
        for block in range(sequence.computed // block_tokens, self.num_blocks(end)):
            held = min(block_tokens, end - block * block_tokens)
            content[sequence.blocks[block]] = sequence.content(block, held, block_tokens)
        sequence.computed = end
        if self.settings.prefix_caching:
            self.publish(sequence)
        if end < sequence.num_tokens:
            return False
        if sequence.preempted_at is not None:
            self.preemption_loss_s += now - sequence.preempted_at
            sequence.preempted_at = None
        sequence.digest = self.read(sequence)
        sequence.output.append(token_after(sequence.digest, self.settings.vocabulary))
        return True

    def read(self, sequence: Sequence) -> int:
        """The sum over everything that its blocks hold now.

        A running sequence keeps it up to date by itself and reads all of it anew at each new block and for
        its last token, so whatever has happened to any of its blocks shows in its output.
        """
        used = self.num_blocks(sequence.computed)
        return sum(map(self.pool.content.__getitem__, sequence.blocks[:used])) & MASK

    def publish(self, sequence: Sequence) -> None:
        """Makes the full blocks findable for other requests with the same beginning."""
        known, full = len(sequence.hashes), sequence.computed // self.settings.block_tokens
        self.hash_blocks(sequence, full)
        for block in range(known, full):
            self.pool.publish(sequence.blocks[block], sequence.hashes[block])
