"""A simulated engine's scheduler: continuous batching over paged blocks, without a clock or a loop.

`schedule` decides a step and holds its blocks; `apply` writes the KV of its tokens and samples the next ones.
"""

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from migration.step_times import StepTimes
from pd_serve.simulated_engine.block_pool import BlockPool
from pd_serve.simulated_engine.cached_keys import next_hash
from pd_serve.simulated_engine.contents import _NEXT, _POSITION, _TOKEN, MASK, sampled_token, token_after
from pd_serve.simulated_engine.sequence import Sequence
from pd_serve.simulated_engine.settings import EngineSettings


@dataclass(frozen=True, slots=True)
class Step:
    """What one step computes.

    Attributes:
        chunks: Parts of prompts: sequences, and the number of tokens of each.
        decodes: Sequences that get one token each.
        dropped: Sequences that have lost their blocks since the step was decided.
    """

    chunks: list[tuple[Sequence, int]]
    decodes: list[Sequence]
    duration_s: float
    dropped: set[Sequence] = field(default_factory=set)


class Batcher:
    """Decides what each step computes.

    Args:
        on_prefill_started: Called with sequences that ask for a hand-off, in the step in which they start.

    Attributes:
        waiting: In the order of admission: by priority, preempted ones first, then by arrival.
        running: The batch.
        held_slots: Slots of the batch kept for suspended and arriving requests.
        step_times: What its steps have taken.
        last_step: The latest step that was decided.
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
        self.step_times = StepTimes()
        self.last_step: Step | None = None
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
        """Takes a sequence out of the queue or the batch and frees its blocks. Idempotent."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            self._count(sequence, -1)
        self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Frees the blocks of a sequence; a step in flight no longer computes it."""
        if self.last_step is not None:
            self.last_step.dropped.add(sequence)
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
        self.last_step = None
        self.last_step = self._schedule(now)
        return self.last_step

    def _schedule(self, now: float) -> Step | None:
        model = self.settings.cost_model
        if not self.settings.mixes:
            chunks = self._admit(self.settings.max_prefill_tokens, whole=True)
            if chunks:
                lengths = [(n, sequence.computed) for sequence, n in chunks]
                return Step(chunks, [], model.prefill_s(lengths))
            self._make_room(self.running, now)
            decodes = self.running.copy()
            if not decodes:
                return None
            return Step([], decodes, self.decode_s(len(decodes), sum([s.computed for s in decodes])))
        decodes = [sequence for sequence in self.running if sequence.is_decoding]
        self._make_room(decodes, now)
        decodes = [sequence for sequence in self.running if sequence.is_decoding]
        budgets = [self.settings.prompt_budget] if self.settings.prompt_budget is not None else []
        if self.settings.chunk_tokens is not None:
            budgets.append(self.settings.chunk_tokens - len(decodes))
        chunks = self._chunks(min(budgets))
        if not decodes and not chunks:
            return None
        lengths = [(n, sequence.computed) for sequence, n in chunks]
        context = sum([s.computed for s in decodes])
        return Step(chunks, decodes, model.mixed_s(lengths, len(decodes), context))

    def decode_s(self, batch_size: int, context_tokens: int) -> float:
        """Duration of a step of decodes only."""
        model = self.settings.cost_model
        if self.settings.mixes:
            return model.mixed_s((), batch_size, context_tokens)
        return model.decode_s(batch_size, context_tokens)

    def _make_room(self, decodes: Iterable[Sequence], now: float) -> None:
        """Gives every decoding sequence a slot for its next token, preempting others if necessary."""
        block_tokens, pool = self.settings.block_tokens, self.pool
        for sequence in [s for s in decodes if s.computed >= len(s.blocks) * block_tokens]:
            while sequence in self.running and sequence.computed >= len(sequence.blocks) * block_tokens:
                if pool.num_free:
                    sequence.blocks += pool.allocate(1)
                    continue
                self.preempt(max(self.running, key=lambda s: (s.priority, s.rank)), now)

    def preempt(self, sequence: Sequence, now: float) -> None:
        """Takes a running sequence's blocks away and queues it to be computed again."""
        self.running.remove(sequence)
        self.work_out(sequence)
        self.release(sequence)
        sequence.computed = 0
        sequence.hashes.clear()
        sequence.is_confirmed = True
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
        """Admits waiting requests to the batch, as far as blocks, slots and the token budget allow.

        Args:
            whole: A prompt is computed in one step (a first one may exceed the budget), or by chunks.
        """
        if not self.waiting or (not whole and budget <= 0):
            return []
        chunks: list[tuple[Sequence, int]] = []
        started = []
        pool = self.pool
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            num_tokens = sequence.num_tokens
            shared = self.cached(sequence)
            if not self._has_room(sequence, shared):
                break
            missing = self.num_blocks(num_tokens) - len(shared)
            n = num_tokens - len(shared) * self.settings.block_tokens
            if whole and chunks and n > budget:
                break
            del self.waiting[0]
            self._count(sequence, -1)
            pool.share(shared)
            sequence.blocks = shared + pool.allocate(missing)
            sequence.computed = num_tokens - n
            if not sequence.preemptions:
                sequence.cached = sequence.computed
            self.running.append(sequence)
            chunks.append((sequence, n if whole else min(n, budget)))
            budget -= n
            if sequence.wants_handoff:
                sequence.wants_handoff = False
                started.append(sequence)
        if started:
            self._on_prefill_started(started)
        return chunks

    def _has_room(self, sequence: Sequence, shared: list[int]) -> bool:
        """Whether there are a slot and blocks for a waiting request, with these cached ones."""
        missing = self.num_blocks(sequence.num_tokens) - len(shared)
        free = self.pool.num_free - self.pool.num_unused(shared)
        slots = self.settings.max_num_seqs - self.held_slots
        return len(self.running) < slots and free - missing >= self.watermark_blocks

    @property
    def is_blocked(self) -> bool:
        """Whether no request can enter the batch before blocks or a slot become free."""
        if not self.waiting:
            return True
        # With a prefix cache, blocks that fill up may be what the first one waits for.
        return not self.settings.prefix_caching and not self._has_room(self.waiting[0], [])

    def cached(self, sequence: Sequence) -> list[int]:
        """Cached blocks with the beginning of a sequence, all but its last token at most."""
        if not self.settings.prefix_caching:
            return []
        full = (sequence.num_tokens - 1) // self.settings.block_tokens
        self.hash_blocks(sequence, full)
        shared = self.pool.cached(sequence.hashes)
        del sequence.hashes[len(shared) :]
        return shared

    def hash_blocks(self, sequence: Sequence, num_blocks: int) -> None:
        """Extends `hashes` to the first `num_blocks` blocks, from the tokens that these hold."""
        block_tokens, hashes = self.settings.block_tokens, sequence.hashes
        for block in range(len(hashes), num_blocks):
            before = hashes[-1] if hashes else 0
            hashes.append(next_hash(before, sequence.content(block, block_tokens, block_tokens)))

    # ---- doing

    def apply(self, step: Step, now: float) -> list[Sequence]:
        """Computes the step's tokens. Returns the sequences that have one more in their `output`."""
        chunks, decodes, dropped = step.chunks, step.decodes, step.dropped
        if dropped:
            chunks = [(sequence, n) for sequence, n in chunks if sequence not in dropped]
            decodes = [sequence for sequence in decodes if sequence not in dropped]
        sampled = [sequence for sequence, n in chunks if self._prefill(sequence, n, now)]
        caching, block_tokens = self.settings.prefix_caching, self.settings.block_tokens
        for sequence in decodes:
            sequence.computed += 1
            sequence.deferred += 1
            if caching:  # which block is found by a hash depends on the order
                self.work_out(sequence)
                if sequence.computed % block_tokens == 0:
                    self.publish(sequence)
        return sampled + decodes

    def repeat(self, batch: list[Sequence], ends: list[float]) -> None:
        """Computes further steps of a batch, none of which ends a request, and takes room for the next.

        Args:
            ends: When each step ends.
        """
        if self.settings.prefix_caching:
            for end in ends:
                self.apply(Step([], batch, 0.0), end)
                self._make_room(batch, end)
            return
        for sequence in batch:
            sequence.computed += len(ends)
            sequence.deferred += len(ends)
        self._make_room(batch, ends[-1])

    def work_out(self, sequence: Sequence) -> None:
        """Writes the KV of a sequence's deferred tokens, and finds out which ones they are.

        Each follows from the contents of its blocks as they are now.
        """
        content, blocks, output = self.pool.content, sequence.blocks, sequence.output
        block_tokens, (first, count) = self.settings.block_tokens, self.settings.vocabulary
        by_chance, digest = self.settings.sampled, sequence.digest
        end = sequence.computed
        last = end - 1 if sequence.tokens_left <= 0 else -1
        for position in range(end - sequence.deferred, end):
            token = output[-1]
            kv = (token + _TOKEN) * (position * _POSITION + 1) & MASK
            block, place = divmod(position, block_tokens)
            held = blocks[block]
            content[held] = (content[held] + kv) & MASK if place else kv
            reads = not place or position == last
            digest = self.read(sequence, position + 1) if reads else (digest + kv) & MASK
            token = first + ((digest * _NEXT & MASK) >> 48) % count
            output.append(sampled_token(token, sequence.epoch, len(output)) if by_chance else token)
        sequence.deferred, sequence.digest = 0, digest

    def _prefill(self, sequence: Sequence, num_tokens: int, now: float) -> bool:
        """Computes a chunk. Returns whether it was the last one, so that a token was sampled."""
        block_tokens, content = self.settings.block_tokens, self.pool.content
        end = sequence.computed + num_tokens
        for block in range(sequence.computed // block_tokens, self.num_blocks(end)):
            held = min(block_tokens, end - block * block_tokens)
            content[sequence.blocks[block]] = sequence.content(block, held, block_tokens)
        sequence.computed = end
        sequence.digest = self.read(sequence, end)
        if self.settings.prefix_caching:
            self.publish(sequence)
        if end < sequence.num_tokens:
            return False
        if sequence.preempted_at is not None:
            self.preemption_loss_s += now - sequence.preempted_at
            sequence.preempted_at = None
        token = token_after(sequence.digest, self.settings.vocabulary)
        if self.settings.sampled:
            token = sampled_token(token, sequence.epoch, len(sequence.output))
        sequence.output.append(token)
        return True

    def read(self, sequence: Sequence, num_tokens: int) -> int:
        """The sum over the contents of its blocks with its first `num_tokens` tokens.

        A running sequence updates the sum at each token. It reads all blocks again at each new block and for
        its last token, so that damage to any block shows in its output.
        """
        used = self.num_blocks(num_tokens)
        return sum(map(self.pool.content.__getitem__, sequence.blocks[:used])) & MASK

    def publish(self, sequence: Sequence) -> None:
        """Adds the full blocks to the prefix cache, unless they may hold anything."""
        if not sequence.is_confirmed:
            return
        known, full = len(sequence.hashes), sequence.computed // self.settings.block_tokens
        self.hash_blocks(sequence, full)
        for block in range(known, full):
            self.pool.publish(sequence.blocks[block], sequence.hashes[block])
