"""The benchmark of the simulator's speed: both ways on a small cluster, and a difference between them."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from loadtests.bench import simulation_speed
from loadtests.bench.report import BenchmarkReport
from loadtests.bench.simulation_speed import SimulationCost, measure
from pd_serve.errors import PdServeError


def test_both_ways_are_measured_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def in_thread(instances: int, requests: int, every_step: bool) -> SimulationCost:
        return await asyncio.to_thread(measure, instances, requests, every_step)

    monkeypatch.setattr(simulation_speed, "_in_process", in_thread)
    file = tmp_path / "speed.json"

    asyncio.run(simulation_speed.run(BenchmarkReport(file), [2], 3))

    by_run, by_step = json.loads(file.read_text())["simulations"]
    assert (by_run["every_step"], by_step["every_step"]) == (False, True)
    for name in ("instances", "requests", "steps", "simulated_s", "result"):
        assert by_run[name] == by_step[name], name
    assert (by_run["instances"], by_run["requests"]) == (2, 6)
    assert by_run["cpu_s"] > 0


def test_results_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def measured(instances: int, requests: int, every_step: bool) -> SimulationCost:
        return replace(SimulationCost(2, 6, every_step, 1.0, 1.0, 1, 1.0, 7), result=int(every_step))

    monkeypatch.setattr(simulation_speed, "_in_process", measured)

    with pytest.raises(PdServeError, match="another result"):
        asyncio.run(simulation_speed.run(BenchmarkReport(None), [2], 3))


def test_requests_per_second_are_those_of_the_cpu_time() -> None:
    assert SimulationCost(16, 100, False, 4.0, 9.0, 1, 1.0, 0).requests_per_cpu_s == 25
