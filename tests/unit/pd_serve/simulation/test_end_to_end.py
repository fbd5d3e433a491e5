"""A few hundred requests for real: through the command, the simulated cluster, the summary and the files."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pd_serve.simulation.case import Case, run_case
from pd_serve.simulation.command import app
from pd_serve.simulation.traces import TraceSpec


@pytest.mark.parametrize("cluster", ["--instances 4", "--prefill 1 --decode 3"])
def test_a_run_loses_nothing(cluster: str, tmp_path: Path) -> None:
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
    case = Case(TraceSpec("m-m", rate=2, requests=100, arrivals="gamma:3", seed=5), "llumnix", {"neutral": 3})

    first, second = run_case(case), run_case(case)

    assert first | {"wall_s": 0} == second | {"wall_s": 0}


def test_a_figure_from_simulations_to_files(tmp_path: Path) -> None:
    arguments = f"paper --figure 13 --rates first --requests 20 --jobs 1 --out {tmp_path}"

    done = CliRunner().invoke(app, arguments.split(), catch_exceptions=False)
    again = CliRunner().invoke(app, arguments.split(), catch_exceptions=False)

    assert (done.exit_code, again.exit_code) == (0, 0)
    assert {path.name for path in tmp_path.iterdir()} == {
        "figure13-priorities.csv",
        "figure13-priorities.md",
        "figure13-priorities.png",
        "provenance.json",
        "runs",
    }
    assert "2 of 2 runs are taken" in again.output
    assert "2 runs of 20 requests" in (tmp_path / "figure13-priorities.md").read_text()


def test_migrations_of_figure_10(tmp_path: Path) -> None:
    arguments = f"paper --figure 10 --rates first,last --out {tmp_path}"

    done = CliRunner().invoke(app, arguments.split(), catch_exceptions=False)

    assert done.exit_code == 0
    assert "downtime of live migration from" in (tmp_path / "figure10-migration.md").read_text()
