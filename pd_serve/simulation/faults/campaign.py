"""Many seeds of fault schedules, on several processes, and what was found."""

import gc
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pd_serve.simulation.faults.draw import draw
from pd_serve.simulation.faults.run import RunResult, run
from pd_serve.simulation.faults.shrink import shrink

#: Number of failing seeds whose faults are reduced.
MAX_SHRUNK = 10


@dataclass
class FailedSeed:
    """A seed with findings.

    Attributes:
        faults: The faults that are needed for a finding of this kind, by index in the schedule.
        texts: The same, as texts.
    """

    seed: int
    tier: int
    findings: list[str]
    faults: list[int]
    texts: list[str]

    @property
    def replay(self) -> str:
        """The command that runs it again, with its trace."""
        faults = ",".join(map(str, self.faults)) or "none"
        return f"pd-serve simulate faults --tier {self.tier} --seed {self.seed} --faults {faults} --trace"


@dataclass
class CampaignResult:
    """The result of all seeds.

    Attributes:
        deaths: Ended processes of instances.
        recoveries: Recomputed requests by reason, and reconciliations by kind.
        simulated_s, cpu_s, wall_s: Durations: sums over all runs, and of the campaign.
    """

    tier: int
    seeds: int = 0
    streams: int = 0
    tokens: int = 0
    deaths: int = 0
    recoveries: Counter[str] = field(default_factory=Counter)
    simulated_s: float = 0.0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    failed: list[FailedSeed] = field(default_factory=list)

    def add(self, result: RunResult) -> None:
        self.seeds += 1
        for name in ("streams", "tokens", "deaths", "simulated_s", "cpu_s"):
            setattr(self, name, getattr(self, name) + getattr(result, name))
        self.recoveries.update(result.recoveries)

    def as_json(self) -> dict[str, Any]:
        """All numbers, and each failing seed with its schedule."""
        failed = [
            msgspec.to_builtins(seed)
            | {"replay": seed.replay, "schedule": msgspec.to_builtins(draw(seed.seed, seed.tier))}
            for seed in self.failed
        ]
        return msgspec.to_builtins(self) | {"failed": failed}  # type: ignore[no-any-return]


def run_campaign(
    seeds: Iterable[int],
    tier: int,
    *,
    until_failure: bool = False,
    workers: int = 2,
    on_progress: Callable[[CampaignResult], None] = lambda result: None,
) -> CampaignResult:
    """Runs all seeds of a tier.

    Args:
        until_failure: Ends with the first seed that has a finding.
        workers: Number of processes; they are forks of this one.
        on_progress: Called after each seed.
    """
    began = time.perf_counter()
    result = CampaignResult(tier)
    for seed, found in _results(seeds, tier, workers):
        result.add(found)
        if found.findings:
            result.failed.append(_failed(seed, tier, found, reduced=len(result.failed) < MAX_SHRUNK))
        result.wall_s = time.perf_counter() - began
        on_progress(result)
        if until_failure and found.findings:
            break
    return result


def _results(seeds: Iterable[int], tier: int, workers: int) -> Iterator[tuple[int, RunResult]]:
    tasks = ((seed, tier) for seed in seeds)
    with _frozen_garbage():
        if workers == 1:
            yield from map(_run_seed, tasks)
            return
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            yield from pool.imap(_run_seed, tasks, chunksize=4)


@contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Keeps the garbage collector, which runs after each seed, from what was there before."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _run_seed(task: tuple[int, int]) -> tuple[int, RunResult]:
    return task[0], run(draw(*task))


def _failed(seed: int, tier: int, found: RunResult, *, reduced: bool) -> FailedSeed:
    schedule = draw(seed, tier)
    numbers = list(range(len(schedule.faults)))
    if reduced:
        numbers, _ = shrink(schedule, found.findings, run)
    texts = [str(schedule.faults[number]) for number in numbers]
    return FailedSeed(seed, tier, found.findings, numbers, texts)
