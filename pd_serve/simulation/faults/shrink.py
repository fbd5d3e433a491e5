"""Reduces the faults of a failing run to the fewest that still make it fail."""

import re
from collections.abc import Callable

from pd_serve.simulation.faults.run import RunResult
from pd_serve.simulation.faults.schedule import Schedule

#: Maximum number of runs of one reduction.
MAX_RUNS = 60


def kind_of(finding: str) -> str:
    """A finding without its names and numbers: equal for findings of one kind."""
    return re.sub("…(, …)+", "…", re.sub(r"'[^']*'|[\w-]*\d[\w.]*", "…", finding))


def shrink(
    schedule: Schedule, findings: list[str], run: Callable[[Schedule], RunResult]
) -> tuple[list[int], RunResult | None]:
    """Leaves out faults as long as a finding of the same kind remains.

    Source of the method: Zeller and Hildebrandt, Simplifying and Isolating Failure-Inducing Input (ddmin).

    Returns:
        The indices of the remaining faults, and the result with them; None if nothing could be left out.
    """
    kinds = {kind_of(finding) for finding in findings}
    numbers = list(range(len(schedule.faults)))
    result: RunResult | None = None
    parts, runs = 2, 0
    while numbers and runs < MAX_RUNS:
        size = max(1, len(numbers) // parts)
        for begin in range(0, len(numbers), size):
            fewer = numbers[:begin] + numbers[begin + size :]
            runs += 1
            found = run(schedule.only(fewer))
            if kinds & {kind_of(finding) for finding in found.findings}:
                numbers, result, parts = fewer, found, max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts = min(len(numbers), 2 * parts)
    return numbers, result
