"""Results of simulations: kept in files, reused, and failures reported after all others have ended."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import rich.console

from loadtests.experiments.result_store import ExperimentRun, code_digest, code_files, run_scenarios
from pd_serve.errors import PdServeError
from pd_serve.simulation.scenario import Scenario
from pd_serve.simulation.workloads import TraceSpec

ROOT = Path(__file__).parents[4]
SCENARIO = Scenario(TraceSpec("s-s", rate=5, requests=40), "infaas++")


@pytest.fixture
def screen() -> rich.console.Console:
    return rich.console.Console(file=io.StringIO(), width=200)


def keep(scenario: Scenario, out: Path, code: str) -> None:
    folder = ExperimentRun(out).folder
    folder.mkdir()
    (folder / f"{scenario.key}.json").write_text(json.dumps({"requests": 40, "code": code}))


def text(screen: rich.console.Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_a_kept_result_is_not_run_again(tmp_path: Path, screen: rich.console.Console) -> None:
    keep(SCENARIO, tmp_path, code_digest())

    results = run_scenarios([SCENARIO, SCENARIO], ExperimentRun(tmp_path), screen)

    assert results == {SCENARIO.key: {"requests": 40, "code": code_digest()}}
    assert "1 of 1 results are taken" in text(screen)
    assert "warning" not in text(screen)


def test_results_of_other_code_give_a_warning(tmp_path: Path, screen: rich.console.Console) -> None:
    keep(SCENARIO, tmp_path, "other")

    run_scenarios([SCENARIO], ExperimentRun(tmp_path), screen)

    assert "1 of these come from other code" in text(screen)


def test_a_failed_simulation_is_reported_and_the_others_are_kept(
    tmp_path: Path, screen: rich.console.Console
) -> None:
    good = replace(SCENARIO, trace=replace(SCENARIO.trace, requests=5))
    bad = replace(SCENARIO, policy="best")

    with pytest.raises(PdServeError, match=r"1 of 2 simulations failed:\n.*no policy 'best'"):
        run_scenarios([bad, good], ExperimentRun(tmp_path, jobs=1), screen)

    assert [path.stem for path in (tmp_path / "runs").iterdir()] == [good.key]
    assert run_scenarios([good], ExperimentRun(tmp_path), screen)[good.key]["requests"] == 5


def test_fresh_runs_a_kept_scenario_again(tmp_path: Path, screen: rich.console.Console) -> None:
    scenario = replace(SCENARIO, trace=replace(SCENARIO.trace, requests=5))
    keep(scenario, tmp_path, "other")

    run = ExperimentRun(tmp_path, fresh=True)
    assert run_scenarios([scenario], run, screen)[scenario.key]["requests"] == 5
    assert json.loads((tmp_path / "runs" / f"{scenario.key}.json").read_text())["code"] == code_digest()


def test_the_digest_covers_all_code_that_a_simulation_imports() -> None:
    code = (
        "import sys, pd_serve.simulation.simulate, pd_serve.simulation.scenario; "
        "print(*(m.__file__ for n, m in sys.modules.items() "
        "if n.split('.')[0] in ('pd_serve', 'router', 'migration')))"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    imported = {Path(file).relative_to(ROOT) for file in done.stdout.split()}
    assert imported
    assert imported - {path.relative_to(ROOT) for path in code_files()} == set()
