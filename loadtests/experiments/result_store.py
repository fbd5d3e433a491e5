"""Runs many simulations in parallel processes and keeps each result in a file for the next call."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import rich.console

from loadtests.terminal import new_progress
from migration.child_process import spawned_pool
from pd_serve.errors import PdServeError
from pd_serve.simulation.scenario import Scenario, run_scenario

ROOT = Path(__file__).resolve().parents[2]

#: The code that a result depends on: these packages, without those that no simulation imports.
PACKAGES = ("migration", "router", "pd_serve")
NOT_SIMULATED = (
    "migration/vllm_engine",
    *(f"pd_serve/{name}" for name in ("api", "cli", "dashboard", "launch", "models", "profiling")),
)

#: Summaries of simulations by `Scenario.key`.
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class ExperimentRun:
    """How an experiment is run.

    Attributes:
        out: Folder for tables and plots; results are kept in its folder `runs`.
        jobs: Number of processes; None for one per core.
        traces: Folder of trace files.
        fresh: Run all simulations again, even those with a kept result.
    """

    out: Path
    jobs: int | None = None
    traces: Path | None = None
    fresh: bool = False

    @property
    def folder(self) -> Path:
        return self.out / "runs"


def run_scenarios(
    scenarios: Iterable[Scenario], run: ExperimentRun, console: rich.console.Console
) -> Results:
    """Runs the scenarios that have no kept result, and returns all results.

    Raises:
        PdServeError: Simulations failed. The others were finished and kept.
    """
    by_key = {scenario.key: scenario for scenario in scenarios}
    if not by_key:
        return {}
    run.folder.mkdir(parents=True, exist_ok=True)
    results = {} if run.fresh else _kept(by_key, run.folder)
    stale = sum(result["code"] != code_digest() for result in results.values())
    if results:
        console.print(f"{len(results)} of {len(by_key)} results are taken from {run.folder}")
    if stale:
        console.print(f"[yellow]warning[/]  {stale} of these come from other code: --fresh runs them again")
    missing = [scenario for key, scenario in by_key.items() if key not in results]
    if missing:
        results |= _run(missing, run, console)
    return results


@cache
def code_digest() -> str:
    """A digest of the code that a result depends on."""
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def code_files() -> list[Path]:
    """The source files that a result depends on."""
    left_out = tuple(ROOT / folder for folder in NOT_SIMULATED)
    return [
        path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if not any(path.is_relative_to(folder) for folder in left_out)
    ]


def _kept(by_key: dict[str, Scenario], folder: Path) -> Results:
    paths = {key: folder / f"{key}.json" for key in by_key}
    return {key: json.loads(path.read_text()) for key, path in paths.items() if path.exists()}


def _run(scenarios: list[Scenario], run: ExperimentRun, console: rich.console.Console) -> Results:
    results: Results = {}
    failures: list[str] = []
    pool = spawned_pool(min(run.jobs or os.cpu_count() or 1, len(scenarios)))
    with new_progress(console, auto_refresh=True) as progress:
        try:
            running = {pool.submit(run_scenario, scenario, run.traces): scenario for scenario in scenarios}
            ended = as_completed(running)
            for future in progress.track(ended, total=len(running), description="simulations"):
                scenario = running[future]
                if (error := future.exception()) is not None:
                    failures.append(f"{scenario}: {type(error).__name__}: {error}")
                    continue
                results[scenario.key] = future.result() | {"code": code_digest()}
                _keep(run.folder / f"{scenario.key}.json", results[scenario.key])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if failures:
        shown = "\n  ".join(failures[:5])
        raise PdServeError(f"{len(failures)} of {len(scenarios)} simulations failed:\n  {shown}")
    return results


def _keep(path: Path, result: dict[str, Any]) -> None:
    """Writes the file atomically, so that an existing file is complete."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result) + "\n")
    part.replace(path)
