"""Schedules of faults."""

from dataclasses import replace

import pytest

from loadtests.chaos import schedule
from loadtests.chaos.schedule import Fault, FaultRates, Operation, Target
from loadtests.chaos.targets import RAY_SERVE_RATES, SERVE_RATES


def test_the_same_seed_draws_the_same_faults_and_another_seed_others() -> None:
    drawn = schedule.draw(7, 50, 600.0, SERVE_RATES)

    assert drawn == schedule.draw(7, 50, 600.0, SERVE_RATES)
    assert drawn != schedule.draw(8, 50, 600.0, SERVE_RATES)


def test_the_faults_fill_the_duration() -> None:
    drawn = schedule.draw(1, 40, 300.0, SERVE_RATES)

    assert [fault.number for fault in drawn] == list(range(40))
    assert sum(fault.pause_s for fault in drawn) == pytest.approx(300.0)
    assert schedule.draw(1, 0, 300.0, SERVE_RATES) == []


def test_every_kind_of_fault_is_drawn() -> None:
    drawn = schedule.draw(3, 2000, 1.0, RAY_SERVE_RATES)

    kills = {target for fault in drawn if fault.freeze_s is None for target in fault.targets}
    freezes = {target for fault in drawn if fault.freeze_s is not None for target in fault.targets}
    assert kills == set(RAY_SERVE_RATES.kill)
    assert freezes == set(RAY_SERVE_RATES.freeze)
    assert {fault.during for fault in drawn} == {*Operation, None}
    assert {len(fault.targets) for fault in drawn} == {1, 2}


def test_no_fault_affects_more_processes_of_a_kind_than_there_are() -> None:
    """It would wait for the second one in vain."""
    rates = replace(SERVE_RATES, numbers={Target.DECODE: 2, Target.NEUTRAL: 0})
    pairs = {fault.targets for fault in schedule.draw(5, 3000, 1.0, rates) if len(fault.targets) == 2}

    assert (Target.DECODE, Target.DECODE) in pairs
    assert [one for one, other in pairs if one is other] == [Target.DECODE]
    alone = FaultRates({Target.SCHEDULER: 1}, {Target.SCHEDULER: 1}, {})
    assert {len(fault.targets) for fault in schedule.draw(5, 200, 1.0, alone)} == {1}


def test_a_freeze_is_as_long_as_each_of_its_processes_allows() -> None:
    drawn = [fault for fault in schedule.draw(4, 3000, 1.0, SERVE_RATES) if fault.freeze_s is not None]

    raylets = [fault.freeze_s for fault in drawn if Target.RAYLET in fault.targets]
    assert raylets
    assert max(filter(None, raylets)) <= SERVE_RATES.longest_freeze_s[Target.RAYLET]
    assert max(fault.freeze_s for fault in drawn if fault.freeze_s) > 30.0


def test_an_operation_can_be_left_out() -> None:
    drawn = schedule.draw(5, 500, 1.0, SERVE_RATES)

    without = schedule.only(drawn, without={Operation.RESTART})

    assert any(fault.during is Operation.RESTART for fault in drawn)
    assert all(fault.during is not Operation.RESTART for fault in without)
    assert [fault.targets for fault in without] == [fault.targets for fault in drawn]


def test_a_fault_is_described() -> None:
    kill = Fault(0, 1.0, (Target.PREFILL, Target.DECODE), None, Operation.DRAIN, 0.5, 1)
    freeze = Fault(1, 1.0, (Target.MANAGER,), 12.34, None, 0.0, 1)

    assert str(kill) == "kill prefill and decode, during drain"
    assert str(freeze) == "freeze 12.3 s manager"
