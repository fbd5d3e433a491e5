"""`pd-serve simulate` from its arguments to its files, on a simulation that takes no time."""

import json
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pd_serve.cli import simulate, simulate_output
from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.scenario import run_scenario
from tests.unit.loadtests.experiments.made_results import stand_in


@pytest.fixture
def _no_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_output, "run_scenario", partial(run_scenario, simulate=stand_in))


@pytest.mark.usefixtures("_no_simulation")
def test_run_shows_a_table_and_writes_numbers(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.json"
    arguments = f"run --trace s-s --rate 5 --requests 40 --prefill 2 --decode 3 --policy p2c --json {path}"
    more = "--arrivals gamma:2 --priority-fraction 0.1 --autoscale decode=1:4 --set headroom=1 --seed 7"

    done = CliRunner().invoke(simulate.app, f"{arguments} {more}".split(), catch_exceptions=False)

    assert done.exit_code == 0
    assert "prefill (TTFT), high" in done.output
    written = json.loads(path.read_text())
    assert written["requests"] == 40
    assert written["by_priority"]["high"]["requests"] == 4
    assert written["config"]["instances"] == {"prefill": 2, "decode": 3}
    assert written["config"]["autoscale"] == {"decode": [1, 4]}
    assert written["config"]["overrides"] == {"headroom": 1}
    assert {"command", "commit", "machine"} <= written.keys()


def test_run_without_a_rate_says_so() -> None:
    with pytest.raises(InvalidRequestError, match="a rate is needed"):
        CliRunner().invoke(simulate.app, ["run", "--trace", "s-s"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, 0, 0), {"neutral": 16}),
        ((4, 0, 0), {"neutral": 4}),
        ((None, 2, 3), {"prefill": 2, "decode": 3}),
        ((1, 2, 3), {"prefill": 2, "decode": 3, "neutral": 1}),
    ],
)
def test_the_cluster(given: tuple[int | None, int, int], expected: dict[str, int]) -> None:
    assert simulate.cluster_of(*given) == expected


def test_a_cluster_that_cannot_serve() -> None:
    with pytest.raises(InvalidRequestError, match="both be at least 1"):
        simulate.cluster_of(None, 2, 0)


def test_bounds_of_pools() -> None:
    assert simulate.bounds_of(["1:8"], ["neutral"]) == {"neutral": (1, 8)}
    assert simulate.bounds_of(["1:8", "decode=2:4"], ["prefill", "decode"]) == {
        "prefill": (1, 8),
        "decode": (2, 4),
    }


@pytest.mark.parametrize("text", ["8:1", "0:4", "4", "a:b", "decode=1:2"])
def test_bounds_that_cannot_be(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="--autoscale"):
        simulate.bounds_of([text], ["neutral"])
