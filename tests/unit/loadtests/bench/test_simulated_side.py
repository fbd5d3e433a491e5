"""The simulated side of the simulator benchmark."""

import pytest

from loadtests.bench import simulated_side
from loadtests.bench.load import Load
from loadtests.bench.simulated_side import NETWORK, FrontEnd, alone
from loadtests.bench.simulator import LENGTHS
from loadtests.outcome import Outcome
from pd_serve.simulated_engine.cost_model import LinearCostModel
from pd_serve.simulation.config import TraceRequest

ABOUT = {
    "num_blocks": 512,
    "block_tokens": 32,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "kv_bytes_per_token": 4096,
}
MODEL = LinearCostModel((3.0, 0.02, 1e-5), (2.0, 0.1, 0.0))


def test_a_single_request_takes_the_time_of_its_steps() -> None:
    by_role = simulated_side.engines(ABOUT, MODEL)
    wanted = simulated_side.config([TraceRequest(0.0, 100, 11)], {"neutral": 1}, by_role, NETWORK, seed=0)

    (outcome,) = simulated_side.simulate(wanted)

    assert outcome.gaps_s == pytest.approx([2.1e-3] * 10)
    hops_s = 2 * wanted.network.message_latency_s
    assert outcome.ttft_s == pytest.approx(5.1e-3 + hops_s, rel=0.02)
    assert outcome.e2e_s == pytest.approx((outcome.ttft_s or 0) + 21e-3)


def test_disaggregated_engines_serve_all_requests() -> None:
    by_role = simulated_side.engines(ABOUT, MODEL)
    requests = Load("l", 30, LENGTHS, rate=20.0).requests(seed=0)

    outcomes = simulated_side.simulate(
        simulated_side.config(requests, {"prefill": 1, "decode": 1}, by_role, NETWORK, seed=0)
    )

    assert [outcome.tokens for outcome in outcomes] == [request.output_tokens for request in requests]
    assert [len(outcome.gaps_s) for outcome in outcomes] == [r.output_tokens - 1 for r in requests]


def outcomes(front_end: FrontEnd) -> list[Outcome]:
    """Of requests that are alone in a service with this front end."""
    requests = alone([TraceRequest(0.0, 100, 11) for _ in range(3)])
    by_role = simulated_side.engines(ABOUT, front_end.around(MODEL))
    wanted = simulated_side.config(requests, {"neutral": 1}, by_role, NETWORK, 0, front_end.request_s)
    return simulated_side.simulate(wanted)


def test_a_measured_front_end_makes_the_simulation_as_slow_as_the_service() -> None:
    service = FrontEnd(request_s=0.004, step_s=0.0005)

    measured = FrontEnd.measured(outcomes(service), outcomes(FrontEnd()))

    assert measured.request_s == pytest.approx(service.request_s)
    assert measured.step_s == pytest.approx(service.step_s)
    assert [o.ttft_s for o in outcomes(measured)] == pytest.approx([o.ttft_s for o in outcomes(service)])


def test_a_service_that_is_faster_than_its_steps_has_no_front_end() -> None:
    faster = FrontEnd.measured(outcomes(FrontEnd()), outcomes(FrontEnd(0.004, 0.0005)))

    assert faster == FrontEnd()


def test_a_mixed_step_takes_what_the_instance_takes_for_one_step() -> None:
    model = LinearCostModel((3.0, 0.0, 0.0), (2.0, 0.0, 0.0), mixed_ms=4.0)

    slower = FrontEnd(step_s=0.001).around(model)

    assert slower.mixed_s([(1, 0)], 1, 1) == pytest.approx(0.005)
