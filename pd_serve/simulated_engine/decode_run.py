"""Decode steps of one batch as one event: their ends are known before they come.

Between two changes of a batch its steps differ in the length of its requests only. So when each of them will
end, and how many KV blocks it will take, is known at the first one. A run ends with the step in which its
first request ends, and before one that might find no free block. Anything else that concerns the engine, such
as a call of its llumlet, cuts it short at the end of the step in progress.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from pd_serve.simulated_engine.batcher import Step
from pd_serve.simulated_engine.sequence import Sequence as Request

#: Most steps of a run, and about its longest time in seconds: every 0.5 s a report of requests cuts it.
MOST_STEPS, LONGEST_S = 64, 0.5


@dataclass(slots=True)
class DecodeRun:
    """Steps that follow each other without an event between them.

    Attributes:
        step: What each of them computes.
        durations, ends: When each of them ends, and how long it takes.
        taken: KV blocks that are taken at the end of each step for later ones; 0 first, at the beginning.
        reports: Steps, from 0 on, after which the load is reported.
        delivery_s: Time from the end of a step until a client has its tokens.
        computed: Number of steps that the batch has taken in.
        timed: Number of steps that are in the engine's mean times.
    """

    step: Step
    durations: list[float]
    ends: list[float]
    taken: list[int]
    reports: list[int] = field(default_factory=list)
    delivery_s: float = 0.0
    computed: int = 0
    timed: int = 1

    def num_ended(self, now: float) -> int:
        """Steps that have ended."""
        return bisect_right(self.ends, now)

    def cut(self, now: float) -> bool:
        """Ends the run with the step in progress. Returns whether it has become shorter."""
        steps = self.num_ended(now) + 1
        if steps >= len(self.ends):
            return False
        del self.ends[steps:]
        return True

    def next_report(self) -> int | None:
        """Takes the next step after which the load is reported, unless it is the last one."""
        if self.reports and self.reports[0] < len(self.ends) - 1:
            return self.reports.pop(0)
        return None


def report_steps(ends: Sequence[float], reported_at: float, interval_s: float) -> list[int]:
    """The steps that end at least `interval_s` after the report before."""
    steps = []
    for step, end in enumerate(ends):
        if end - reported_at >= interval_s:
            steps.append(step)
            reported_at = end
    return steps


def blocks_taken(batch: Sequence[Request], block_tokens: int, steps: int) -> list[int]:
    """KV blocks that the next steps of a batch take: up to the beginning of the first, of the second...

    Args:
        batch: Requests with room for the token of the first step.
    """
    taken = [0] * steps
    for request in batch:
        room = len(request.blocks) * block_tokens - request.computed
        for step in range(room, steps, block_tokens):
            taken[step] += 1
    return list(accumulate(taken))
