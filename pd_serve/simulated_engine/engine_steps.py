"""What the steps of a simulated engine do: decides, computes, sends and reports, for `step_loop`."""

import asyncio
from collections.abc import Callable, Iterable

from migration.engine_interface import EngineEvents
from pd_serve.simulated_engine.batcher import Batcher, Step
from pd_serve.simulated_engine.decode_run import LONGEST_S, MOST_STEPS, DecodeRun, blocks_taken, report_steps
from pd_serve.simulated_engine.emitter import SequenceEmitter
from pd_serve.simulated_engine.engine_load import read_load
from pd_serve.simulated_engine.faults import EngineFaults
from pd_serve.simulated_engine.migrations import SequenceMigrations
from pd_serve.simulated_engine.sequence import Sequence
from router.load import EngineLoad

#: Least time between two load reports if no request came or went.
LOAD_INTERVAL_S = 0.1


class EngineSteps:
    """Implements `step_loop.Stepping`.

    Args:
        end: Called with each sequence that has finished.
        is_copying: Whether KV is being copied into this instance or out of it, which slows its steps.
        delivery_s: Returns the time that an output takes to its client. None: each step is an event.
        faults: See `SimulatedEngine`.

    Attributes:
        steps, busy_s: Steps ended, and the time that those begun take together.
    """

    def __init__(
        self,
        batcher: Batcher,
        migrations: SequenceMigrations,
        emitter: SequenceEmitter,
        events: EngineEvents,
        end: Callable[[Sequence], None],
        is_copying: Callable[[], bool],
        delivery_s: Callable[[], float] | None,
        faults: EngineFaults | None,
    ) -> None:
        self.steps, self.busy_s = 0, 0.0
        self._batcher, self._migrations, self._emitter = batcher, migrations, emitter
        self._events, self._end, self._faults = events, end, faults
        self._is_copying, self._delivery_s = is_copying, delivery_s
        self._clock = asyncio.get_running_loop().time
        self._run: DecodeRun | None = None
        self._reported: tuple[int, ...] = ()
        self._reported_at = 0.0

    # ---- Stepping

    def schedule(self) -> Step | None:
        self._batcher.held_slots = self._migrations.held_slots
        return self._batcher.schedule(self._clock())

    def begin(self, step: Step) -> float:
        now = self._clock()
        for sequence, _ in step.chunks:
            if sequence.begun_at is None:
                sequence.begun_at = now
        duration_s = step.duration_s * self._pace
        if self._faults is not None:
            begun = [sequence.request_id for sequence, _ in step.chunks]
            duration_s += self._faults.begin_step(begun, self._events.on_death)
        prompt_tokens = sum([n for _, n in step.chunks])
        self._batcher.step_times.add(duration_s, prompt_tokens, decodes=bool(step.decodes))
        self.busy_s += duration_s
        return duration_s

    def plan(self, step: Step, ends_at: float) -> DecodeRun | None:
        if self._delivery_s is None or not self._is_repeated(step):
            return None
        batcher, batch = self._batcher, step.decodes
        in_time = int(LONGEST_S / step.duration_s) + 1
        most = min(MOST_STEPS, in_time, min([s.tokens_left for s in batch]))
        taken = blocks_taken(batch, batcher.settings.block_tokens, most)
        while taken and taken[-1] > batcher.pool.num_free:
            taken.pop()
        if len(taken) < 2:
            return None
        context, number, pace = sum([s.computed for s in batch]), len(batch), self._pace
        durations, ends = [0.0], [ends_at]
        for further in range(1, len(taken)):
            durations.append(batcher.decode_s(number, context + further * number) * pace)
            ends.append(ends[-1] + durations[-1])
        reports = report_steps(ends, self._reported_at, LOAD_INTERVAL_S)
        self._run = DecodeRun(step, durations, ends, taken, reports, self._delivery_s())
        return self._run

    def catch_up(self, run: DecodeRun, steps: int) -> None:
        self._time(run, steps + 1)
        ends = run.ends[run.computed : steps]
        if not ends:
            return
        run.computed = steps
        self._batcher.repeat(run.step.decodes, ends)
        delivered = [end + run.delivery_s for end in ends]
        for sequence in run.step.decodes:
            sequence.delivered += delivered
        self.steps += len(ends)

    def finish(self, step: Step) -> None:
        self._run = None
        self.steps += 1
        now = self._clock()
        due = self._batcher.apply(step, now)
        if self._delivery_s is not None and not self._batcher.settings.prefix_caching:
            at = now + self._delivery_s()
            for sequence in due:
                if _may_wait(sequence):
                    sequence.delivered.append(at)
            due = [sequence for sequence in due if not _may_wait(sequence)]
        for sequence in due:
            self._batcher.work_out(sequence)
        if due:
            for sequence in self._emitter.emit(due, now):
                self._end(sequence)

    def at_boundary(self) -> None:
        self.send(self._migrations.asked_for_stage)
        self._migrations.settle_stages()

    def report(self) -> None:
        """As vLLM's adapter: growth by a token per request is reported less often than steps end."""
        batcher, migrations, now = self._batcher, self._migrations, self._clock()
        state = (
            len(batcher.running),
            len(batcher.waiting),
            len(migrations.arriving),
            len(migrations.suspended),
        )
        if state != self._reported or now - self._reported_at >= LOAD_INTERVAL_S:
            self._reported, self._reported_at = state, now
            self._events.on_load(self._load(begun=0))

    # ---- state

    def load(self) -> EngineLoad:
        """The present load."""
        return self._load(begun=1)

    def send(self, sequences: Iterable[Sequence | None]) -> None:
        """Sends the tokens of sequences that have waited."""
        waited = [sequence for sequence in sequences if sequence is not None and sequence.delivered]
        for sequence in waited:
            self._batcher.work_out(sequence)
        if waited:
            self._emitter.emit(waited, self._clock())

    def compute_ended(self) -> None:
        """Takes in the steps of a run that have ended, with what they add to the prefix cache."""
        if self._run is not None:
            self.catch_up(self._run, self._num_ended(self._run))

    # ---- helpers

    @property
    def _pace(self) -> float:
        return 1.0 + self._batcher.settings.migration_slowdown * self._is_copying()

    def _is_repeated(self, step: Step) -> bool:
        """Whether nothing but its own end can make the next step another one.

        All requests of the batch have been delivered tokens of the same epoch from here: what follows
        concerns their clients only.
        """
        if step.chunks or not self._batcher.is_blocked or self._migrations.asked_for_stage:
            return False
        return all(_may_follow(s) for s in step.decodes)

    def _num_ended(self, run: DecodeRun) -> int:
        return min(run.num_ended(self._clock()), len(run.ends) - 1)

    def _time(self, run: DecodeRun, steps: int) -> None:
        """The first steps have begun."""
        add = self._batcher.step_times.add
        for duration_s in run.durations[run.timed : steps]:
            add(duration_s, 0)
            self.busy_s += duration_s
        run.timed = max(run.timed, steps)

    def _load(self, begun: int) -> EngineLoad:
        """Args: begun: 1 if the step in progress counts in the mean times, as it has begun."""
        taken = 0
        if (run := self._run) is not None:
            ended = self._num_ended(run)
            self._time(run, ended + begun)
            taken = run.taken[ended] - run.taken[run.computed]
        return read_load(self._batcher, self._migrations, taken)


def _may_follow(sequence: Sequence) -> bool:
    """Whether the next tokens of a sequence may be sent later, with their times: only its client needs them.

    A token of the same epoch has been sent from here.
    """
    return sequence.told == (sequence.client, sequence.epoch)


def _may_wait(sequence: Sequence) -> bool:
    """Whether the latest token of a sequence may be sent with later ones."""
    return sequence.deferred > 0 and sequence.tokens_left > 0 and _may_follow(sequence)
