"""The compared numbers of a service and its simulation."""

import asyncio

import pytest

from loadtests.bench import fidelity, simulated_side
from loadtests.bench.fidelity import RealRound
from loadtests.bench.load import Lengths, Load
from loadtests.bench.rounds import Round
from loadtests.bench.simulated_side import NETWORK, FrontEnd
from loadtests.outcome import Outcome
from pd_serve.simulated_engine.cost_model import LinearCostModel
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulation.config import TraceRequest

LENGTHS = Lengths(prompt=(16, 256), output=(16, 96))
MODEL = LinearCostModel((3.0, 0.02, 1e-5), (2.0, 0.1, 0.0))


def engines(model: LinearCostModel) -> dict[str, EngineSettings]:
    return {"neutral": EngineSettings(model, chunk_tokens=512, prefix_caching=True)}


def served(requests: list[TraceRequest], seed: int, layout: dict[str, int]) -> list[Outcome]:
    """By a service that is itself a simulation, with a front end."""
    front_end = FrontEnd(request_s=0.004, step_s=0.0005)
    by_role = engines(front_end.around(MODEL))
    wanted = simulated_side.config(requests, layout, by_role, NETWORK, seed, front_end.request_s)
    return simulated_side.simulate(wanted)


@pytest.mark.parametrize("layout", [{"neutral": 1}, {"prefill": 1, "decode": 2}])
async def test_a_service_that_is_a_simulation_is_simulated_like_it(layout: dict[str, int]) -> None:
    load, alone = Load("lengths", 30, LENGTHS, rate=10.0), Load("alone", 5, LENGTHS, num_clients=1)
    rounds = []
    for seed in range(2):
        outcomes = await asyncio.to_thread(served, load.requests(seed), seed, layout)
        one_by_one = simulated_side.alone(alone.requests(seed))
        alone_outcomes = await asyncio.to_thread(served, one_by_one, seed, layout)
        rounds.append(RealRound(load, Round(3.0, 1.0, 0.5, outcomes), alone, alone_outcomes, MODEL))

    found = await fidelity.compared(layout, rounds, engines, NETWORK)

    for front_end in found["front_end_ms"]:
        # Steps that begin while KV is copied are slower, so that a few gaps differ.
        assert front_end == pytest.approx({"request_s": 4.0, "step_s": 0.5}, rel=0.05)
    assert found["real_ms"]["request"]["p50"] > 50.0
    ratios = [ratio for parts in found["ratio"].values() for ratio in parts.values()]
    assert ratios == pytest.approx([1.0] * 9, rel=0.02)
    assert fidelity.missed(found["ratio"]) == []


def made(
    e2e_s: tuple[float, float], ttft_s: tuple[float, float], gap_s: tuple[float, float]
) -> list[Outcome]:
    return [Outcome(n, 2, ttft_s[n], [gap_s[n]], e2e_s[n]) for n in range(2)]


def test_numbers_are_in_milliseconds_and_ratios_are_real_to_simulated() -> None:
    real = fidelity.summary(made((0.2, 0.4), (0.01, 0.03), (0.004, 0.008)))
    simulated = fidelity.summary(made((0.1, 0.2), (0.01, 0.03), (0.002, 0.004)))

    assert real["request"]["mean"] == 300.0
    assert real["ttft"]["p50"] == 20.0
    found = fidelity.ratios(real, simulated)
    assert (found["request"]["mean"], found["ttft"]["p99"], found["itl"]["p50"]) == (2.0, 1.0, 2.0)


def test_a_ratio_misses_its_target_on_either_side() -> None:
    ratio = {"mean": 9.0, "p50": 1.1, "p99": 0.8}
    slow, fast = ratio | {"p50": 1.11}, ratio | {"p99": 0.79}

    assert fidelity.missed({"request": ratio, "ttft": slow, "itl": fast}) == ["ttft p50", "itl p99"]
