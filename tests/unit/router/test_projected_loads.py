"""Reports, corrected by decisions until the reports show them. Through decisions: `test_dispatcher.py`."""

import random
from collections import Counter

import pytest
from msgspec.structs import replace

from router.load import InstanceLoad
from router.projected_loads import LOST_AFTER_S, LOST_DISPATCH_AFTER_S, ProjectedLoads, after_departures
from tests.manual_clock import ManualClock
from tests.unit.router.made_loads import neutral


def projected_loads(*reports: InstanceLoad, clock: ManualClock | None = None) -> ProjectedLoads:
    loads = ProjectedLoads(clock, max_report_age_s=3.0)
    for report in reports:
        loads.report(report)
    return loads


def test_without_decisions_the_projection_is_the_report() -> None:
    report = neutral("i0")

    assert projected_loads(report).all() == [report]


def test_a_move_counts_at_both_ends_until_its_source_has_confirmed_it() -> None:
    source, destination = neutral("i0", 0, 4), neutral("i1")
    loads = projected_loads(source, destination)
    loads.add_move("i0", "i1", 25)

    assert loads.projected("i0").migrating_out == 1
    arriving = loads.projected("i1")
    assert (arriving.migrating_in, arriving.expected_blocks, arriving.expected_requests) == (1, 25, 1)

    loads.report(source)  # was on its way when the move was ordered
    assert loads.projected("i0").migrating_out == 1

    loads.report(replace(source, moves_decided=1))
    assert loads.projected("i0").migrating_out == 0
    assert loads.projected("i1") == destination


def test_a_report_may_have_seen_a_part_of_the_moves() -> None:
    source = neutral("i0", 0, 4, moves_decided=3)
    loads = projected_loads(source, neutral("i1"), neutral("i2"))
    loads.add_move("i0", "i1", 10)
    loads.add_move("i0", "i2", 20)

    loads.report(replace(source, moves_decided=4))

    assert [load.expected_blocks for load in loads.all()] == [0, 0, 20]


def test_an_instance_that_is_forgotten_takes_no_part_until_its_next_report() -> None:
    """What is on its way there is still to be settled."""
    first, second = neutral("i0"), neutral("i1")
    loads = projected_loads(first, second)
    loads.add_dispatch("i0", 100, 7)
    loads.add_move("i0", "i1", 25)
    loads.expect("i0", "r", 10)

    loads.forget("i0")
    loads.forget("i0")

    assert (loads.all(), loads.fresh(), "i0" in loads) == ([second], [second], False)
    loads.report(first)
    assert loads.projected("i0").waiting == 0
    assert loads.projected("i0").expected_blocks == 10
    loads.settled("i0", "r")
    assert loads.all() == [second, first]


def test_a_dispatch_that_is_never_confirmed_is_lost_after_a_while() -> None:
    clock = ManualClock(0.0)
    report = neutral("i0")
    loads = projected_loads(report, clock=clock)
    loads.add_dispatch("i0", 100, 7)
    clock.now = LOST_DISPATCH_AFTER_S
    loads.report(report)
    assert loads.projected("i0").waiting == 1

    clock.now += 0.1
    loads.report(report)

    assert loads.all() == [report]


def test_a_move_that_is_never_confirmed_is_lost_after_a_while() -> None:
    clock = ManualClock(0.0)
    reports = [neutral("i0", 0, 4), neutral("i1")]
    loads = projected_loads(*reports, clock=clock)
    loads.add_move("i0", "i1", 25)

    clock.now = LOST_AFTER_S
    assert loads.all() != reports
    clock.now += 0.1
    assert loads.all() == reports


@pytest.mark.parametrize("removed", ["i0", "i1"])
def test_the_moves_of_a_removed_instance_count_nowhere(removed: str) -> None:
    reports = {name: neutral(name) for name in ("i0", "i1")}
    loads = projected_loads(*reports.values())
    loads.add_move("i0", "i1", 25)

    loads.remove(removed)
    loads.report(reports[removed])

    assert loads.projected("i1") == reports["i1"]


def test_reports_that_are_too_old_are_silent_and_not_fresh() -> None:
    clock = ManualClock(0.0)
    loads = projected_loads(neutral("old"), clock=clock)
    clock.now = 2.0
    loads.report(neutral("new"))
    clock.now = 4.0

    assert [load.instance_id for load in loads.fresh()] == ["new"]
    assert loads.silent() == {"old": 4.0}
    assert len(loads.all()) == 2


def test_a_report_is_as_old_as_the_step_in_progress() -> None:
    clock = ManualClock(0.0)
    loads = projected_loads(neutral("hangs", step_s=4.0), neutral("works", step_s=1.0), clock=clock)

    assert [load.instance_id for load in loads.fresh()] == ["works"]
    assert loads.silent() == {}


def test_projections_are_those_of_all_decisions_whatever_their_order() -> None:
    """They are kept, and made again only for instances that a report or a decision was about."""
    dice, clock = random.Random(1), ManualClock(0.0)
    loads = ProjectedLoads(clock, max_report_age_s=5.0)
    names = [f"n-{number}" for number in range(6)]
    sent: Counter[str] = Counter()
    for number in range(2000):
        clock.now += dice.random()
        name = dice.choice(names)
        match dice.randrange(6):
            case 0 | 1:
                step_s = dice.choice([0.0, 0.0, 2.0])
                loads.report(neutral(name, requests_added=sent[name], moves_decided=number, step_s=step_s))
            case 2 if name in loads:
                loads.add_dispatch(name, 10, 1)
                sent[name] += 1
            case 3 if name in loads:
                loads.add_move(name, dice.choice(names), 2)
            case 4:
                loads.expect(name, str(number % 7), 3)
                loads.settled(dice.choice(names), str(dice.randrange(7)))
            case 5 if dice.random() < 0.1:
                loads.remove(name)
        known = [loads._project(load) for load in loads]
        old = clock.now - 5.0
        assert loads.fresh() == [
            load for load in known if loads._reported_at[load.instance_id] - load.step_s >= old
        ]
        assert [loads.projected(load.instance_id) for load in loads] == known
        loads._expire_moves()
        assert loads.all() == [loads._project(load) for load in loads]


def test_departures_are_requests_of_average_size() -> None:
    load = neutral("i0", 40, 4, migrating_out=1)

    assert after_departures(load) == replace(load, free_blocks=55, running=3)
    assert after_departures(neutral("i0")) == neutral("i0")
    everything = replace(load, migrating_out=9)
    assert after_departures(everything) == replace(everything, free_blocks=100, running=0)
