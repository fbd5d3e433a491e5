"""Schedules drawn from seeds."""

from collections import Counter

import msgspec
import pytest

from pd_serve.simulation.faults.draw import draw
from pd_serve.simulation.faults.schedule import FaultKind, Schedule

TIERS = (1, 2, 3, 4)


@pytest.mark.parametrize("tier", TIERS)
def test_a_seed_gives_one_schedule_and_another_seed_another_one(tier: int) -> None:
    assert draw(5, tier) == draw(5, tier)
    assert draw(5, tier) != draw(6, tier)


@pytest.mark.parametrize("tier", TIERS)
def test_a_schedule_is_data(tier: int) -> None:
    schedule = draw(1, tier)
    assert msgspec.convert(msgspec.to_builtins(schedule), Schedule) == schedule


def test_all_kinds_of_faults_are_drawn() -> None:
    kinds = Counter(fault.kind for tier in TIERS for seed in range(400) for fault in draw(seed, tier).faults)

    assert set(FaultKind) - set(kinds) == set()


def test_faults_of_the_first_tier_are_single_ones() -> None:
    for seed in range(200):
        faults = draw(seed, 1).faults
        kinds = Counter(fault.kind for fault in faults)
        assert len(faults) == 1 or kinds[FaultKind.KILL]
        assert len(faults) <= 2 or (kinds[FaultKind.WALL] == 1 and kinds[FaultKind.KILL] == len(faults) - 1)


def test_no_fault_kills_the_only_process_of_a_service() -> None:
    for tier in TIERS:
        for seed in range(300):
            schedule = draw(seed, tier)
            if schedule.shape.one_process:
                killed = [fault.target for fault in schedule.faults if fault.kind is FaultKind.KILL]
                assert not any(target.startswith(("api", "manager")) for target in killed)


def test_some_clients_read_slowly() -> None:
    requests = [request for seed in range(50) for request in draw(seed, 1).requests]
    slow = [request.reads_every_s for request in requests if request.reads_every_s]

    assert 0 < len(slow) < len(requests) / 4
    assert 0.05 <= min(slow) < max(slow) <= 20.0


def test_a_part_of_a_schedule_has_the_same_requests() -> None:
    schedule = draw(3, 3)
    part = schedule.only([1, 2])
    assert part.faults == schedule.faults[1:3]
    assert (part.shape, part.requests) == (schedule.shape, schedule.requests)
