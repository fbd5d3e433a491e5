"""`pd-serve bench simulator`: the workload, the simulated side, and the figures that are compared."""

import pytest

from loadtests.bench import simulator, virtual, workload
from loadtests.bench.real import Cluster
from loadtests.bench.servers import OURS
from loadtests.bench.workload import Latencies
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


def test_a_workload_is_a_function_of_its_seed() -> None:
    first = workload.make(50, 10.0, seed=1)

    assert first == workload.make(50, 10.0, seed=1) != workload.make(50, 10.0, seed=2)
    assert first[0].arrival_s == 0
    assert all(16 <= r.prompt_tokens <= 256 and 16 <= r.output_tokens <= 96 for r in first)


def test_the_moderate_rate_is_slower_on_a_slower_machine() -> None:
    slow = LinearCostModel((6.0, 0.04, 2e-5), (4.0, 0.2, 0.0))

    assert workload.moderate_rate(MODEL) == pytest.approx(2 * workload.moderate_rate(slow), rel=0.1)


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 1), (8, 2), (64, 16)])
def test_engines_leave_cores_to_the_front_end_and_the_clients(cores: int, expected: int) -> None:
    assert simulator.threads(cores) == expected


def test_a_request_alone_takes_the_time_of_its_steps() -> None:
    by_role = virtual.engines(ABOUT, MODEL)
    wanted = virtual.config([TraceRequest(0.0, 100, 11)], {"neutral": 1}, by_role, seed=0)

    seen = virtual.simulated(wanted)

    assert seen.itl_s == pytest.approx([2.1e-3] * 10)
    hops_s = 2 * wanted.network.message_latency_s
    assert seen.ttft_s == pytest.approx([5.1e-3 + hops_s], rel=0.02)
    assert seen.request_s == pytest.approx([seen.ttft_s[0] + 21e-3])


def test_disaggregated_engines_serve_all_of_a_workload() -> None:
    by_role = virtual.engines(ABOUT, MODEL)
    requests = workload.make(30, 20.0, seed=0)

    seen = virtual.simulated(virtual.config(requests, {"prefill": 1, "decode": 1}, by_role, seed=0))

    assert len(seen.request_s) == len(seen.ttft_s) == 30
    assert len(seen.itl_s) == sum(request.output_tokens - 1 for request in requests)


def test_figures_are_in_milliseconds_and_ratios_real_to_simulated() -> None:
    real = workload.summary(Latencies([0.2, 0.4], [0.01, 0.03], [0.004, 0.008]))
    simulated = workload.summary(Latencies([0.1, 0.2], [0.01, 0.03], [0.002, 0.004]))

    assert real["request"]["mean"] == 300.0
    assert real["ttft"]["p50"] == 20.0
    found = workload.ratios(real, simulated)
    assert (found["request"]["mean"], found["ttft"]["p99"], found["itl"]["p50"]) == (2.0, 1.0, 2.0)


def test_the_service_is_started_with_its_own_defaults() -> None:
    command = Cluster("tiny", [], {}, {"prefill": 1, "decode": 1}).command(OURS, 1234)

    assert command[1:] == ["serve", "tiny", "--prefill=1", "--decode=1", "--host=127.0.0.1", "--port=1234"]
