"""A few hundred requests through the command, the simulated cluster, the summary and the files."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pd_serve.cli.simulate import app
from pd_serve.simulation.scenario import Scenario, run_scenario
from pd_serve.simulation.workloads import TraceSpec


@pytest.mark.parametrize("cluster", ["--instances 4", "--prefill 1 --decode 3"])
def test_a_run_loses_no_request_and_no_token(cluster: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    arguments = f"run --trace s-s --rate 6 --requests 200 {cluster} --priority-fraction 0.1 --json {path}"

    done = CliRunner().invoke(app, arguments.split(), catch_exceptions=False)

    assert done.exit_code == 0
    summary = json.loads(path.read_text())
    assert summary["requests"] == 200
    for name in ("failed", "lost_tokens", "duplicated_tokens", "wrong_tokens", "leaked_blocks", "integrity"):
        assert not summary[name], name
    assert 0 < summary["prefill_s"]["p50"] < summary["request_s"]["p50"]
    assert summary["by_priority"]["high"]["requests"] == 20


def test_a_run_is_a_function_of_its_seed() -> None:
    case = Scenario(
        TraceSpec("m-m", rate=2, requests=100, arrivals="gamma:3", seed=5), "llumnix", {"neutral": 3}
    )

    first, second = run_scenario(case), run_scenario(case)

    assert first | {"wall_s": 0} == second | {"wall_s": 0}
