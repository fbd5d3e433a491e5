"""`pd-serve plan` from its arguments to its files."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pd_serve.cli.plan import parse_slo, plan, serve_flags
from pd_serve.errors import InvalidRequestError
from pd_serve.planning.fast_cluster import Layout
from router.slo import Slo

app = typer.Typer()
app.command()(plan)


def run(arguments: str) -> str:
    done = CliRunner().invoke(app, arguments.split(), catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_a_plan_has_the_best_layout_its_cost_and_a_picture(tmp_path: Path) -> None:
    path, picture = tmp_path / "plan.json", tmp_path / "deep" / "plan.svg"

    output = run(
        "--trace 500:50 --requests 100 --slo ttft=500ms,itl=0.02 --gpus 2 --cost-model h100-llama-3.1-8b"
        f" --gpu-hour-price 2 --jobs 1 --json {path} --picture {picture}"
    )

    written = json.loads(path.read_text())
    best, first = written["best"], written["layouts"][0]
    assert best.keys() == {"layout", "prefill", "decode", "neutral", "chunk"}
    assert best == {name: first[name] for name in best}
    assert len(written["layouts"]) == 7
    goodput, hours = first["goodput"], first["gpu_hours_per_million_tokens"]
    assert hours == pytest.approx(2 / 3600 / (goodput * 50) * 1e6)
    assert first["cost_per_million_tokens"] == pytest.approx(2 * hours)
    assert written["slo"] == {"ttft_s": 0.5, "itl_s": 0.02}
    assert picture.read_text().startswith("<svg")
    assert "pd-serve serve MODEL" in output


def test_a_target_out_of_reach_is_said(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    output = run(
        "--trace 500:50 --requests 20 --slo ttft=1ms,itl=1ms --gpus 1 --cost-model h100-llama-3.1-8b --jobs 1"
        f" --json {path}"
    )

    assert "no layout" in output
    assert json.loads(path.read_text())["best"] is None


def test_nothing_of_the_table_is_cut_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    output = run(
        "--trace 500:50 --requests 20 --rate 0.125 --slo ttft=1,itl=25ms --gpus 2 --jobs 1"
        " --cost-model h100-llama-3.1-8b --gpu-hour-price 2"
    )

    assert "goodput/s" in output
    assert "at 0.118/s" in output
    assert "…" not in output
    assert any("best" in line and "pd-serve serve" in line for line in output.splitlines())


@pytest.mark.parametrize(
    ("layout", "gpus", "flags"),
    [
        (Layout(neutral=8, chunk_tokens=512), 1, "--neutral 8 --max-num-batched-tokens 512"),
        (Layout(neutral=8), 1, "--neutral 8"),
        (
            Layout(prefill=1, decode=3, chunk_tokens=2048),
            2,
            "--prefill 1 --decode 3 --prefill-max-num-batched-tokens 2048 --tensor-parallel-size 2",
        ),
    ],
)
def test_the_flags_of_the_best_layout_are_all_that_serve_needs(layout: Layout, gpus: int, flags: str) -> None:
    assert serve_flags(layout, gpus) == flags


@pytest.mark.parametrize("text", ["ttft=0.5,itl=0.025", "ttft=500ms,tpot=25ms", " itl=25ms,ttft=0.5s"])
def test_a_target_is_in_seconds_or_has_a_unit(text: str) -> None:
    assert parse_slo(text) == Slo(0.5, 0.025)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ttft=1", "both ttft and itl are needed"),
        ("ttft=1,itl=fast", "must be such as"),
        ("ttft=1,itl=25", "write ms for milliseconds"),
        ("ttft=1,e2e=3", "must be such as"),
        ("ttft=-1,itl=1", "must be such as"),
        ("ttft=1,itl=25us", "must be such as"),
        ("", "must be such as"),
    ],
)
def test_another_target_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        parse_slo(text)
