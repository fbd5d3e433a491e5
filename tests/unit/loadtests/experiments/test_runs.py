"""Many runs: kept on disk, gone on with, failures told after the others have ended."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import rich.console

from loadtests.experiments import runs
from pd_serve.errors import PdServeError
from pd_serve.simulation.scenario import Scenario
from pd_serve.simulation.workloads import TraceSpec

CASE = Scenario(TraceSpec("s-s", rate=5, requests=40), "infaas++")


@pytest.fixture
def screen() -> rich.console.Console:
    return rich.console.Console(file=io.StringIO(), width=200)


def keep(case: Scenario, folder: Path, code: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{case.key}.json").write_text(json.dumps({"requests": 40, "code": code}))


def text(screen: rich.console.Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_what_is_kept_is_not_run_again(tmp_path: Path, screen: rich.console.Console) -> None:
    keep(CASE, tmp_path, runs.code_digest())

    results = runs.run_all([CASE, CASE], tmp_path, screen)

    assert results == {CASE.key: {"requests": 40, "code": runs.code_digest()}}
    assert "1 of 1 runs are taken" in text(screen)
    assert "warning" not in text(screen)


def test_results_of_other_code_are_pointed_out(tmp_path: Path, screen: rich.console.Console) -> None:
    keep(CASE, tmp_path, "other")

    runs.run_all([CASE], tmp_path, screen)

    assert "1 of these were made by other code" in text(screen)


def test_a_failed_run_is_told_and_the_others_are_kept(tmp_path: Path, screen: rich.console.Console) -> None:
    good = replace(CASE, trace=replace(CASE.trace, requests=5))
    bad = replace(CASE, policy="best")

    with pytest.raises(PdServeError, match=r"1 of 2 runs failed:\n.*no policy 'best'"):
        runs.run_all([bad, good], tmp_path, screen, jobs=1)

    assert [path.stem for path in tmp_path.iterdir()] == [good.key]
    assert runs.run_all([good], tmp_path, screen)[good.key]["requests"] == 5


def test_fresh_runs_again(tmp_path: Path, screen: rich.console.Console) -> None:
    case = replace(CASE, trace=replace(CASE.trace, requests=5))
    keep(case, tmp_path, "other")

    assert runs.run_all([case], tmp_path, screen, fresh=True)[case.key]["requests"] == 5
    assert json.loads((tmp_path / f"{case.key}.json").read_text())["code"] == runs.code_digest()
