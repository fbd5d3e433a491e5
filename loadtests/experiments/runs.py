"""Many simulations side by side in processes, each kept in a file: a rerun goes on where one ended."""

import hashlib
import json
import multiprocessing
import multiprocessing.queues
import os
import queue
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pd_serve.errors import PdServeError
from pd_serve.simulation.scenario import Scenario, run_scenario

ROOT = Path(__file__).resolve().parents[2]

#: What a result depends on, without what only starts simulations and shows their results.
CODE = ("migration/*.py", "router/**/*.py", "pd_serve/*.py", "pd_serve/simulation/*.py")
NOT_IN_RESULTS = {
    *("cli", "console", "service", "status"),
    *("ablation", "arms", "command", "experiment", "plots", "runs", "show"),
}

Results = dict[str, dict[str, Any]]

_done: "multiprocessing.queues.Queue[int] | None" = None


def run_all(
    cases: Iterable[Scenario],
    folder: Path,
    console: rich.console.Console,
    jobs: int | None = None,
    traces: Path | None = None,
    fresh: bool = False,
) -> Results:
    """Runs what `folder` has no result of, and returns all by `Case.key`.

    Args:
        folder: Takes a file per run as soon as it has ended.
        jobs: Processes; None for one per core.
        fresh: Runs everything again.

    Raises:
        PdServeError: Runs have failed. The others have been finished and kept.
    """
    by_key = {case.key: case for case in cases}
    folder.mkdir(parents=True, exist_ok=True)
    results = {} if fresh else _kept(by_key, folder)
    stale = sum(result["code"] != code_digest() for result in results.values())
    if results:
        console.print(f"{len(results)} of {len(by_key)} runs are taken from {folder}")
    if stale:
        console.print(
            f"[yellow]warning[/]  {stale} of these were made by other code: --fresh runs them again"
        )
    missing = [case for key, case in by_key.items() if key not in results]
    if missing:
        results |= _run(missing, folder, console, min(jobs or os.cpu_count() or 1, len(missing)), traces)
    return results


@cache
def code_digest() -> str:
    """Tells whether results come from the same code."""
    digest = hashlib.sha256()
    for pattern in CODE:
        for path in sorted(ROOT.glob(pattern)):
            if path.stem not in NOT_IN_RESULTS:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _kept(by_key: dict[str, Scenario], folder: Path) -> Results:
    paths = {key: folder / f"{key}.json" for key in by_key}
    return {key: json.loads(path.read_text()) for key, path in paths.items() if path.exists()}


def _run(
    cases: list[Scenario], folder: Path, console: rich.console.Console, jobs: int, traces: Path | None
) -> Results:
    # Spawned, not forked: this process draws a progress bar from a thread.
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    results: Results = {}
    failures: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, refresh_per_second=2) as progress,
        ProcessPoolExecutor(jobs, context, initializer=_remember, initargs=(done,)) as pool,
    ):
        task = progress.add_task("", total=sum(case.trace.requests or 0 for case in cases) or None)
        running: dict[Future[dict[str, Any]], Scenario] = {
            pool.submit(_run_here, case, traces): case for case in cases
        }
        try:
            while running:
                text = f"{len(results)} of {len(cases)} runs · requests"
                progress.update(task, advance=_taken(done), description=text)
                for future in wait(running, timeout=0.5, return_when="FIRST_COMPLETED").done:
                    case = running.pop(future)
                    error = future.exception()
                    if error is not None:
                        failures.append(f"{case}: {type(error).__name__}: {error}")
                        continue
                    results[case.key] = future.result() | {"code": code_digest()}
                    _keep(folder / f"{case.key}.json", results[case.key])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failures:
        shown = "\n  ".join(failures[:5])
        raise PdServeError(f"{len(failures)} of {len(cases)} runs failed:\n  {shown}")
    return results


def _remember(done: "multiprocessing.queues.Queue[int]") -> None:
    global _done
    _done = done


def _run_here(case: Scenario, traces: Path | None) -> dict[str, Any]:
    told = 0

    def tell(ended: int, total: int) -> None:
        nonlocal told
        if _done is not None:
            _done.put(ended - told)
        told = ended

    return run_scenario(case, traces, tell)


def _taken(done: "multiprocessing.queues.Queue[int]") -> int:
    ended = 0
    while True:
        try:
            ended += done.get_nowait()
        except queue.Empty:
            return ended


def _keep(path: Path, result: dict[str, Any]) -> None:
    """In one go: a file that is there is whole."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result) + "\n")
    part.replace(path)
