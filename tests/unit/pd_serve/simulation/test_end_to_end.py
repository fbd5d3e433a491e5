"""A few hundred requests through the command, the simulated cluster, the summary and the files."""

import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pd_serve.cli.simulate import app
from pd_serve.simulation.scenario import Scenario, run_scenario
from pd_serve.simulation.simulated_network import SimulatedFabric
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


def test_more_requests_stay_on_their_machine_if_the_network_is_slow_and_all_instances_get_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two machines with a prefill and two decode instances each."""
    copy_s = SimulatedFabric.copy_s
    shares = {}
    for gb_per_s in (0.0, 0.1):
        stays: Counter[bool] = Counter()
        taken: Counter[str] = Counter()

        def counted(
            fabric: SimulatedFabric, source: str, destination: str, size: int, stays=stays, taken=taken
        ) -> float:
            stays[fabric._settings.node_of(source) == fabric._settings.node_of(destination)] += 1
            taken[destination] += 1
            return copy_s(fabric, source, destination, size)

        monkeypatch.setattr(SimulatedFabric, "copy_s", counted)
        trace = TraceSpec("s-s", rate=8, requests=500)
        pools = {"prefill": 2, "decode": 4}
        summary = run_scenario(Scenario(trace, "llumnix", pools, nodes=2, far_gb_per_s=gb_per_s))
        assert not summary["wrong_tokens"]
        assert all(taken[f"decode-{number}"] > taken.total() / 20 for number in range(4))
        shares[gb_per_s] = stays[True] / stays.total()
    assert shares[0.0] < 0.55 < 0.62 < shares[0.1]
