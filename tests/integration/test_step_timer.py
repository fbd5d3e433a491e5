"""Steps of real vLLM schedulers, measured."""

import time
from types import SimpleNamespace

import pytest

from tests.integration.scheduler_lab import KINDS, Kind, nodes_at_rest

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_prompts_and_decode_steps_are_measured(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    clock = SimpleNamespace(perf_counter=lambda: now, monotonic=time.monotonic)
    monkeypatch.setattr("migration.vllm_engine.step_timer.time", clock)
    with nodes_at_rest() as make:
        node = make(kind)
        complete = node.runner.complete

        def slow_complete(jobs: list, *metadata: object) -> object:  # type: ignore[type-arg]
            nonlocal now
            now += 0.02 + 1e-4 * sum(job.end - job.start - 1 for job in jobs)
            return complete(jobs, *metadata)  # type: ignore[arg-type]

        node.runner.complete = slow_complete  # type: ignore[method-assign, assignment]
        node.add("r", list(range(1000)), max_tokens=40)
        node.run_to_the_end()
        now += 30.0  # idle
        node.add("other", list(range(500)), max_tokens=40)
        node.run_to_the_end()
        times = node.scheduler.step_times
        assert times.decode_s == pytest.approx(0.02, rel=0.01)
        assert times.prompt_token_s == pytest.approx(1e-4, rel=0.25)
