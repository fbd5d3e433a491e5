"""The fast model of a cluster: by hand where steps are known, and against the simulated cluster."""

from dataclasses import replace

import pytest

from pd_serve.planning.fast_cluster import HANDOFF_S, FastRun, Layout
from pd_serve.simulated_engine.cost_model import LinearCostModel
from pd_serve.simulated_engine.hardware import Hardware, hardware
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulation.config import NetworkSettings, SimulationConfig, TraceRequest
from pd_serve.simulation.simulate import simulate
from pd_serve.simulation.workloads import TraceSpec, make_requests
from router.slo import Slo

#: A prompt token takes 1 ms, a decode step 10 ms.
STEPS = EngineSettings(LinearCostModel((0.0, 1.0, 0.0), (10.0, 0.0, 0.0)), num_blocks=100)
MACHINE = Hardware(STEPS, kv_bytes_per_s=1e15, kv_latency_s=0.0)
#: Name of a latency here, by that in the simulated cluster's records.
FAST_NAMES = {"prefill_s": "ttft_s", "decode_s": "tpot_s"}
LOOSE = Slo(100.0, 100.0)


def ran(layout: Layout, requests: list[TraceRequest], machine: Hardware = MACHINE) -> FastRun:
    run = FastRun(machine, layout, LOOSE)
    run.run(requests)
    return run


def test_a_request_takes_its_prompt_and_a_step_for_each_later_token() -> None:
    (request,) = ran(Layout(neutral=1), [TraceRequest(1.0, 100, 11)]).requests

    assert request.ttft_s == pytest.approx(0.1)
    assert request.tpot_s == pytest.approx(0.010)


def test_a_later_prompt_interrupts_decodes_at_the_next_step() -> None:
    first, second = ran(Layout(neutral=1), [TraceRequest(0, 100, 21), TraceRequest(0.145, 50, 1)]).requests

    assert second.first_token_s == pytest.approx(0.150 + 0.050)
    assert first.last_token_s == pytest.approx(0.1 + 20 * 0.010 + 0.050)


def test_chunks_share_steps_with_decodes() -> None:
    layout = Layout(neutral=1, chunk_tokens=51)
    first, second = ran(layout, [TraceRequest(0, 51, 21), TraceRequest(0.055, 100, 1)]).requests

    assert second.first_token_s == pytest.approx(0.061 + 2 * 0.060)  # two steps of 50 tokens beside a decode
    assert first.last_token_s == pytest.approx(0.051 + 20 * 0.010 + 2 * 0.050)


def test_a_request_decodes_during_its_hand_off_and_pauses_for_its_end_only() -> None:
    slow = replace(MACHINE, kv_bytes_per_s=101 * STEPS.kv_bytes_per_token / 0.5, kv_latency_s=0.0)
    layout = Layout(prefill=1, decode=1, chunk_tokens=4096)

    (request,) = ran(layout, [TraceRequest(0, 100, 101)], slow).requests

    assert request.first_token_s == pytest.approx(0.1)
    assert request.last_token_s == pytest.approx(0.1 + 100 * 0.010 + HANDOFF_S)


def test_a_handed_off_request_is_not_delayed_by_later_prompts() -> None:
    layout = Layout(prefill=1, decode=1, chunk_tokens=4096)
    prompts = [TraceRequest(0, 100, 101), *(TraceRequest(0.3 + 0.1 * i, 90, 1) for i in range(5))]

    disaggregated = ran(layout, prompts).requests[0]
    aggregated = ran(Layout(neutral=1, chunk_tokens=4096), prompts).requests[0]

    assert disaggregated.last_token_s == pytest.approx(1.1, abs=0.02)
    assert aggregated.last_token_s == pytest.approx(1.1 + 5 * 0.090)


def test_requests_without_room_wait_and_a_full_batch_preempts_the_latest() -> None:
    requests = [TraceRequest(0.01 * i, 500, 400) for i in range(6)]  # 5,400 tokens, room for 1,600

    run = ran(Layout(neutral=1), requests)

    assert all(request.tpot_s < float("inf") for request in run.requests)
    assert run.requests[5].first_token_s > run.requests[0].last_token_s


def test_a_run_ends_when_too_many_requests_have_missed_the_target() -> None:
    run = FastRun(MACHINE, Layout(neutral=1), Slo(0.001, 1.0), max_misses=3)
    run.run([TraceRequest(float(i), 100, 2) for i in range(100)])

    assert run.attainment == 0
    assert sum(request.tpot_s < float("inf") for request in run.requests) == 4


@pytest.mark.parametrize(
    ("layout", "count"), [(Layout(neutral=3, chunk_tokens=2048), 150), (Layout(0, 1, 2, 2048), 80)], ids=str
)
def test_latencies_are_close_to_those_of_the_simulated_cluster(layout: Layout, count: int) -> None:
    machine = hardware("a100-llama-3.1-8b")
    requests = make_requests(TraceSpec("m-m", 9.0, count, seed=3))
    instances = {"neutral": layout.neutral, "prefill": layout.prefill, "decode": layout.decode}
    config = SimulationConfig(
        requests,
        {role: count for role, count in instances.items() if count},
        "llumnix",
        {"neutral": machine.engine},
        network=NetworkSettings(kv_latency_s=machine.kv_latency_s, kv_bytes_per_s=machine.kv_bytes_per_s),
    )

    exact = simulate(config).records
    fast = ran(layout, requests, machine).requests

    for name in FAST_NAMES:
        theirs = sorted(getattr(record, name) for record in exact)
        ours = sorted(getattr(request, FAST_NAMES[name]) for request in fast)
        for share in (0.5, 0.9):
            place = int(share * len(theirs))
            # Messages and waits for the next step are not modelled.
            assert ours[place] == pytest.approx(theirs[place], rel=0.1, abs=0.006), (name, share)
