"""Ends, blocks and reports of a run of decode steps, against one step after another."""

from hypothesis import given
from hypothesis import strategies as st

from migration.messages import RequestId
from pd_serve.simulated_engine.batcher import Batcher, Step
from pd_serve.simulated_engine.contents import SegmentPrompt
from pd_serve.simulated_engine.cost_model import LinearCostModel
from pd_serve.simulated_engine.decode_run import DecodeRun, blocks_taken, report_steps
from pd_serve.simulated_engine.sequence import Sequence
from pd_serve.simulated_engine.settings import EngineSettings

SETTINGS = EngineSettings(
    LinearCostModel((1.0, 1.0, 0.0), (1.0, 1.0, 0.0)), num_blocks=200, block_tokens=4, watermark=0.0
)


def decode_run(*ends: float, reports: tuple[int, ...] = ()) -> DecodeRun:
    return DecodeRun(Step([], [], 1.0), [1.0] * len(ends), list(ends), [0] * len(ends), list(reports))


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=8), st.integers(2, 30))
def test_the_blocks_of_a_run_are_those_that_its_steps_take(
    requests: list[tuple[int, int]], steps: int
) -> None:
    batcher = Batcher(SETTINGS, lambda started: None)
    for number, (prompt_tokens, spare_blocks) in enumerate(requests):
        prompt = SegmentPrompt(prompt_tokens, (), 512, number)
        batcher.enqueue(Sequence(RequestId(str(number)), prompt, 100, 0, float(number), []))
        step = batcher.schedule(0.0)
        assert step is not None
        batcher.apply(step, 0.0)
        batcher.running[-1].blocks += batcher.pool.allocate(spare_blocks)
    step = batcher.schedule(0.0)
    assert step is not None
    assert len(step.decodes) == len(requests)
    free = batcher.pool.num_free

    planned = blocks_taken(step.decodes, SETTINGS.block_tokens, steps)

    taken = [0]
    for _ in range(steps - 1):
        batcher.apply(step, 0.0)
        step = batcher.schedule(0.0)
        assert step is not None
        taken.append(free - batcher.pool.num_free)
    assert planned == taken


def test_a_run_is_cut_at_the_end_of_the_step_in_progress() -> None:
    run = decode_run(1.0, 2.0, 3.0, 4.0)

    assert run.cut(1.5)
    assert run.ends == [1.0, 2.0]
    assert not run.cut(1.7)
    assert run.ends == [1.0, 2.0]


def test_a_step_has_ended_at_its_end() -> None:
    run = decode_run(1.0, 2.0, 3.0)

    assert [run.num_ended(at) for at in (0.5, 1.0, 2.5, 3.0)] == [0, 1, 2, 3]
    assert run.cut(1.0)
    assert run.ends == [1.0, 2.0]


def test_the_load_is_reported_after_each_interval_and_at_the_end_by_the_boundary() -> None:
    ends = [0.04, 0.08, 0.12, 0.16, 0.2, 0.24]

    assert report_steps(ends, -0.02, 0.1) == [1, 4]
    run = decode_run(*ends, reports=(1, 4))
    assert run.next_report() == 1
    run.cut(0.15)
    assert run.next_report() is None
