"""The workload of a plan."""

from pathlib import Path

import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.planning.workload import planned_workload
from pd_serve.simulated_engine.hardware import hardware
from pd_serve.simulation.workloads import TraceSpec

PAPER = hardware("a10-llama-7b")


def test_a_generated_trace_needs_no_rate() -> None:
    workload, about = planned_workload(TraceSpec("8000:100", requests=50), hardware("h100-llama-3.1-8b"))

    assert len(workload) == about["requests"] == 50
    assert about["rate"] is None
    assert (about["mean_prompt_tokens"], about["mean_output_tokens"]) == (8000, 100)


def test_a_recorded_trace_has_its_rate_and_its_first_requests(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = [f"2026-01-01 00:00:{second:02d},10,5" for second in range(30)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))

    workload, about = planned_workload(TraceSpec(str(path)), PAPER)

    assert len(workload) == 30
    assert about["rate"] == pytest.approx(1.0)


def test_requests_that_no_instance_holds_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = '{"timestamp": %d, "input_length": %d, "output_length": 10}'
    path.write_text("\n".join(row % (1000 * i, 20_000 if i == 3 else 100) for i in range(6)))

    workload, about = planned_workload(TraceSpec(str(path)), PAPER)

    assert (len(workload), about["left_out"]) == (5, 1)


def test_a_trace_without_any_request_that_fits_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="0 of 20 requests fit an instance"):
        planned_workload(TraceSpec("20000:100", requests=20), PAPER)


def test_a_rate_of_zero_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="must be above 0"):
        planned_workload(TraceSpec("200:100", rate=0.0), PAPER)
