"""Kinds of faults, drawn from seeds."""

from pd_serve.simulation.faults.draw import draw
from pd_serve.simulation.faults.schedule import FaultKind


def test_freezes_last_from_a_tenth_of_a_second_to_a_minute() -> None:
    lengths = [
        fault.for_s
        for seed in range(1000)
        for fault in draw(seed, 1).faults
        if fault.kind is FaultKind.FREEZE
    ]
    assert 0.1 <= min(lengths) < 0.2
    assert 40.0 < max(lengths) <= 60.0


def test_wall_clocks_jump_by_up_to_an_hour_both_ways() -> None:
    jumps = [f.value for seed in range(1000) for f in draw(seed, 1).faults if f.kind is FaultKind.WALL]

    assert -3600 <= min(jumps) < -60
    assert 60 < max(jumps) <= 3600
