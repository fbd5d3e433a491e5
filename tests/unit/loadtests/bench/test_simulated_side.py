"""The simulated side of the simulator benchmark."""

import pytest

from loadtests.bench import simulated_side
from loadtests.bench.load import Load
from loadtests.bench.simulator import LENGTHS
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
    wanted = simulated_side.config([TraceRequest(0.0, 100, 11)], {"neutral": 1}, by_role, seed=0)

    (outcome,) = simulated_side.simulate(wanted)

    assert outcome.gaps_s == pytest.approx([2.1e-3] * 10)
    hops_s = 2 * wanted.network.message_latency_s
    assert outcome.ttft_s == pytest.approx(5.1e-3 + hops_s, rel=0.02)
    assert outcome.e2e_s == pytest.approx((outcome.ttft_s or 0) + 21e-3)


def test_disaggregated_engines_serve_all_requests() -> None:
    by_role = simulated_side.engines(ABOUT, MODEL)
    requests = Load("l", 30, LENGTHS, rate=20.0).requests(seed=0)

    outcomes = simulated_side.simulate(
        simulated_side.config(requests, {"prefill": 1, "decode": 1}, by_role, seed=0)
    )

    assert [outcome.tokens for outcome in outcomes] == [request.output_tokens for request in requests]
    assert [len(outcome.gaps_s) for outcome in outcomes] == [r.output_tokens - 1 for r in requests]
