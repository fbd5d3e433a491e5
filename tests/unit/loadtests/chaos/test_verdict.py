"""The verdict on a run."""

import pytest

from loadtests.chaos import verdict
from loadtests.chaos.monitor import Death
from loadtests.chaos.schedule import Operation, Target
from loadtests.processes import ProcessKind
from tests.unit.loadtests.chaos.made_run import fault, stream


def test_a_connection_that_breaks_when_an_api_server_dies_is_excused() -> None:
    lost = stream(error="the stream was cut off", end_s=21.0, broken=True)

    verdict.excuse([lost], [Death(20.0, ProcessKind.API_SERVER, 5)])

    assert lost.excused
    assert verdict.problems_of_streams([lost]) == []


@pytest.mark.parametrize(("freeze_s", "is_excused"), [(None, True), (4.0, False)])
def test_a_kill_counts_from_when_it_was_sent(freeze_s: float | None, is_excused: bool) -> None:
    """Its process was seen to be gone much later. A freeze breaks no connection."""
    lost = stream(error="the stream was cut off", end_s=20.2, broken=True)

    verdict.excuse(
        [lost],
        [Death(22.5, ProcessKind.API_SERVER, 5)],
        [fault(Target.API_SERVER, 5, at_s=20.0, freeze_s=freeze_s)],
    )

    assert lost.excused is is_excused


@pytest.mark.parametrize("kind", [ProcessKind.INSTANCE, ProcessKind.MANAGER, ProcessKind.SCHEDULER])
def test_no_other_death_excuses_a_broken_connection(kind: ProcessKind) -> None:
    lost = stream(error="the stream was cut off", end_s=21.0, broken=True)

    verdict.excuse([lost], [Death(20.0, kind, 5)])

    assert verdict.problems_of_streams([lost]) == ["1 streams: the stream was cut off"]


@pytest.mark.parametrize("end_s", [15.0, 40.0])
def test_a_connection_that_breaks_at_another_time_is_not_excused(end_s: float) -> None:
    lost = stream(error="the stream was cut off", end_s=end_s, broken=True)

    verdict.excuse([lost], [Death(20.0, ProcessKind.API_SERVER, 5)])

    assert not lost.excused


def test_wrong_tokens_are_never_excused() -> None:
    wrong = stream(error="a token is lost", end_s=21.0)

    verdict.excuse([wrong], [Death(20.0, ProcessKind.API_SERVER, 5)])

    assert verdict.problems_of_streams([stream(), wrong, wrong]) == ["2 streams: a token is lost"]


def test_faults_without_a_process_are_problems() -> None:
    record = fault()
    record.missing.append(Target.PREFILL)

    assert verdict.problems_of_faults(1, [fault()]) == []
    assert verdict.problems_of_faults(2, [record]) == [
        "1 times there was no prefill to signal",
        "1 of 2 faults were carried out",
    ]


def test_the_death_of_a_process_without_a_cause_is_a_problem() -> None:
    later = fault(Target.SCHEDULER, pid=3, at_s=100.0)
    deaths = [
        Death(6.0, ProcessKind.INSTANCE, 11),  # signalled
        Death(7.0, ProcessKind.INSTANCE, 12),
        Death(8.0, ProcessKind.API_SERVER, 13),
        Death(9.0, ProcessKind.OTHER, 14),
        Death(101.0, ProcessKind.INSTANCE, 15),  # after the faults, when sizes are restored
    ]

    assert verdict.unexplained_deaths(deaths, [fault(pid=11), later]) == [
        "a healthy instance (pid 12) ended at 7 s",
        "a healthy api server (pid 13) ended at 8 s",
    ]


def test_a_drain_explains_the_end_of_an_instance_but_not_of_an_api_server() -> None:
    records = [fault(during=Operation.DRAIN), fault(at_s=100.0)]
    deaths = [Death(9.0, ProcessKind.INSTANCE, 12), Death(9.0, ProcessKind.API_SERVER, 13)]

    assert verdict.unexplained_deaths(deaths, records) == ["a healthy api server (pid 13) ended at 9 s"]


def test_the_end_of_a_raylet_explains_that_of_its_processes() -> None:
    records = [fault(Target.RAYLET, pid=2), fault(at_s=100.0)]

    assert verdict.unexplained_deaths([Death(9.0, ProcessKind.API_SERVER, 13)], records) == []


def test_the_summary_counts_what_was_done() -> None:
    excused = stream(error="the stream was cut off", broken=True, excused=True)
    found = verdict.summary(
        [stream(), excused, stream(error="HTTP 500")], [fault(), fault(Target.MANAGER, 3, freeze_s=4.0)]
    )

    assert (found["faults"], found["kills"], found["freezes"]) == (2, 1, 1)
    assert (found["streams"], found["failed"], found["excused"]) == (3, 1, 1)
    assert found["failures"] == {"HTTP 500": 1}
    assert (found["refusals"], found["longest_pause_s"]) == (3, 3.0)
