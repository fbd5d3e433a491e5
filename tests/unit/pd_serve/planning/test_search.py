"""The search for the best layout."""

import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.planning.fast_cluster import FastRun, Layout
from pd_serve.planning.search import Goal, layouts_of, measure, plan
from pd_serve.simulated_engine.hardware import hardware
from pd_serve.simulation.config import TraceRequest
from pd_serve.simulation.workloads import TraceSpec, make_requests
from router.slo import Slo

MACHINE = hardware("h100-llama-3.1-8b")
WORKLOAD = make_requests(TraceSpec("1000:100", 1.0, 200))
GOAL = Goal(Slo(0.5, 0.025))


def test_layouts_are_all_splits_and_all_chunk_sizes() -> None:
    layouts = layouts_of(4, MACHINE)

    assert {(one.prefill, one.decode) for one in layouts if one.is_disaggregated} == {(1, 3), (2, 2), (3, 1)}
    assert {one.chunk_tokens for one in layouts if one.neutral} == {512, 1024, 2048, 4096, 8192}
    assert all(one.neutral in (0, 4) for one in layouts)


def test_one_instance_can_only_be_aggregated() -> None:
    assert all(one.neutral == 1 for one in layouts_of(1, MACHINE))


def test_goodput_is_the_greatest_rate_within_the_target() -> None:
    layout = Layout(neutral=1, chunk_tokens=2048)

    found = measure(layout, WORKLOAD, MACHINE, GOAL, rate=1.0)

    assert found.attainment == 1.0
    assert dict(found.curve)[found.goodput] >= 0.9
    above = [share for rate, share in found.curve if rate > found.goodput]
    assert above
    assert max(above) < 0.9
    assert found.ttft_s is not None
    assert found.ttft_s > 0


def test_more_gpus_serve_more() -> None:
    one, four = (measure(Layout(neutral=n, chunk_tokens=2048), WORKLOAD, MACHINE, GOAL) for n in (1, 4))

    assert 3 * one.goodput < four.goodput < 5 * one.goodput


def test_a_target_that_no_layout_can_meet_has_no_goodput() -> None:
    found = measure(Layout(neutral=1, chunk_tokens=2048), WORKLOAD[:20], MACHINE, Goal(Slo(0.5, 0.001)))

    assert found.goodput == 0
    assert found.ttft_s is None


def test_the_best_layout_comes_first_and_progress_is_told() -> None:
    seen: list[tuple[int, int]] = []

    found = plan(
        WORKLOAD, MACHINE, 2, GOAL, jobs=1, on_progress=lambda done, total: seen.append((done, total))
    )

    assert [one.goodput for one in found] == sorted((one.goodput for one in found), reverse=True)
    assert seen == [(done, 7) for done in range(1, 8)]


def test_a_tight_time_per_token_wants_disaggregation_and_a_loose_one_does_not() -> None:
    """Long prompts beside decodes: with chunks small enough for the target, prompts take too long."""
    prompts = make_requests(TraceSpec("4000:200", 1.0, 60))
    pd, small_chunks, large_chunks = Layout(0, 1, 1, 2048), Layout(2, 0, 0, 512), Layout(2, 0, 0, 8192)

    def goodput(layout: Layout, slo: Slo) -> float:
        return measure(layout, prompts, MACHINE, Goal(slo)).goodput

    tight, loose = Slo(1.0, 0.012), Slo(2.0, 0.1)
    assert goodput(pd, tight) > 1.2 * max(goodput(one, tight) for one in (small_chunks, large_chunks))
    assert goodput(large_chunks, loose) > 1.2 * goodput(pd, loose)


@pytest.mark.parametrize("gpus", [1, 6])
def test_gpus_that_do_not_make_whole_instances_are_refused(gpus: int) -> None:
    with pytest.raises(InvalidRequestError, match="an instance of this cost model has 4"):
        plan(WORKLOAD, hardware("h100x4-llama-3.1-70b"), gpus, GOAL)


def test_runs_are_repeatable() -> None:
    runs = []
    for _ in range(2):
        run = FastRun(MACHINE, Layout(prefill=1, decode=2, chunk_tokens=2048), GOAL.slo)
        run.run([TraceRequest(0.01 * i, 100 + i, 50) for i in range(100)])
        runs.append([(request.first_token_s, request.last_token_s) for request in run.requests])

    assert runs[0] == runs[1]
