"""Reducing the faults of a failing run."""

from pd_serve.simulation.faults.draw import draw
from pd_serve.simulation.faults.run import RunResult
from pd_serve.simulation.faults.schedule import FaultKind, Schedule, ScheduledFault
from pd_serve.simulation.faults.shrink import MAX_RUNS, kind_of, shrink


def schedule(count: int) -> Schedule:
    faults = [ScheduledFault(float(n), FaultKind.KILL, f"instance:{n}") for n in range(count)]
    return Schedule(0, 1, draw(0, 1).shape, [], faults)


def test_only_the_needed_faults_remain() -> None:
    def run(part: Schedule) -> RunResult:
        times = {fault.at_s for fault in part.faults}
        return RunResult(["request 3.1 hangs"] if {2.0, 7.0} <= times else [])

    numbers, result = shrink(schedule(9), ["request 5.1 hangs"], run)

    assert numbers == [2, 7]
    assert result is not None
    assert result.findings


def test_a_finding_of_another_kind_does_not_count() -> None:
    def run(part: Schedule) -> RunResult:
        return RunResult(["request 3.1 hangs"] if len(part.faults) == 4 else ["decode-0 is drained"])

    numbers, result = shrink(schedule(4), ["request 3.1 hangs"], run)

    assert (numbers, result) == ([0, 1, 2, 3], None)


def test_a_run_that_fails_without_faults_needs_none() -> None:
    numbers, _ = shrink(schedule(3), ["x"], lambda part: RunResult(["x"]))

    assert numbers == []


def test_the_number_of_runs_is_bounded() -> None:
    runs = []

    def run(part: Schedule) -> RunResult:
        runs.append(part)
        return RunResult([])

    shrink(schedule(200), ["x"], run)

    assert len(runs) <= MAX_RUNS + 400


def test_findings_of_one_kind_differ_in_names_and_numbers_only() -> None:
    assert kind_of("decode-1 still runs ['3.1']") == kind_of("prefill-0 still runs ['4.2', '5.1']")
    assert kind_of("request 3.1: token 4 is wrong") != kind_of("request 3.1 has not ended")
