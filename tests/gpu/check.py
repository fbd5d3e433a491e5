"""`make gpu-check`: moves requests between two instances on one GPU, and writes what came out as JSON.

    python -m tests.gpu.check --out results/gpu-check.json

Each case has two processes with an engine each, NIXL between their memories, and a time limit; the failure of
one does not end the others. The exit code is 0 if all cases passed. With `--device cpu` it is a dry run.
"""

import argparse
import asyncio
import contextlib
import math
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from pd_serve.models.lora import adapters
from pd_serve.observe import provenance
from pd_serve.platform.cpu import is_cpu_build
from pd_serve.platform.environment import LOOPBACK, engine_environment
from tests.gpu.cases import CASES, Case

#: Cases at a time whose outputs are compared. Those that measure are alone.
JOBS_ON_A_GPU = 4
#: Of one case, in seconds. A CPU may be busy with anything.
CASE_LIMIT_S = {"cuda": 150.0, "cpu": 600.0}
#: Of a run on a GPU, in seconds: a case that has not ended by then has failed.
LIMIT_S = 570.0


async def run_case(case: Case, device: str) -> dict[str, Any]:
    """Runs a case. Raises: Exception: it has failed."""
    from tests.gpu.pair import Pair
    from tests.gpu.trials import Trials

    arguments = await asyncio.to_thread(case.engine_arguments, device)
    environment = engine_environment(2, arguments["model"]) | LOOPBACK | case.environment
    pair = Pair(arguments, environment, device, adapters(1)[0] if case.adapter else None)
    try:
        described = await pair.start()
        if device == "cuda" and described["memory"] == "host":
            raise RuntimeError("the KV cache is not in GPU memory")
        small = device == "cpu"
        trials = Trials(pair, tokens=80 if small else 300, prompt_tokens=333)
        if case.lengths:
            found = await trials.downtime(case.lengths, moves=2 if small else 8)
        else:
            found = await trials.outputs(seeded=case.seeded)
        await pair.rest()
    finally:
        pair.kill()
    return {"instances": described, "trials": found}


async def run_cases(
    cases: Sequence[Case],
    device: str,
    jobs: int,
    limit_s: float,
    end: float = math.inf,
    run: Callable[[Case, str], Awaitable[dict[str, Any]]] = run_case,
) -> dict[str, dict[str, Any]]:
    """Runs cases, `jobs` at a time; those that measure come last, one after the other.

    Args:
        limit_s: Of each case, in seconds.
        end: When all have to have ended, on `time.monotonic()`.

    Returns: by name of the case whether it passed, its seconds, and what it found or why it failed.
    """
    results: dict[str, dict[str, Any]] = {}
    slots = asyncio.Semaphore(jobs)

    async def one(case: Case) -> None:
        async with slots:
            begin, result = time.monotonic(), {}
            left_s = max(0.0, min(limit_s, end - begin))
            try:
                async with asyncio.timeout(left_s):
                    result = {"passed": True, **await run(case, device)}
            except TimeoutError as error:
                result = {"passed": False, "error": str(error) or f"it took more than {left_s:g} s"}
            except Exception as error:
                result = {"passed": False, "error": f"{type(error).__name__}: {error}"}
            results[case.name] = {"seconds": round(time.monotonic() - begin, 1), **result}
            verdict = "passed" if result["passed"] else f"FAILED: {result['error']}"
            print(f"{case.name}: {verdict} ({results[case.name]['seconds']} s)", flush=True)

    await asyncio.gather(*(one(case) for case in cases if not case.lengths))
    for case in cases:
        if case.lengths:
            await one(case)
    return {case.name: results[case.name] for case in cases}


def chosen(names: Sequence[str], device: str) -> tuple[list[Case], dict[str, str]]:
    """The cases to run, and why the others are left out. Raises: SystemExit: a name is unknown."""
    if unknown := set(names) - {case.name for case in CASES}:
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}")
    wanted = [case for case in CASES if case.name in names or not names]
    left_out = {case.name: case.cuda_only for case in wanted if device == "cpu" and case.cuda_only}
    return [case for case in wanted if case.name not in left_out], left_out


def main() -> int:
    parser = argparse.ArgumentParser(description="Moves requests between two instances on one GPU.")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu" if is_cpu_build() else "cuda")
    parser.add_argument("--case", action="append", default=[], help="only this one; can be repeated")
    parser.add_argument("--jobs", type=int, help="cases at a time")
    parser.add_argument("--limit-s", type=float, help="of one case, in seconds")
    options = parser.parse_args()
    cases, left_out = chosen(options.case, options.device)
    jobs = options.jobs or (1 if options.device == "cpu" else JOBS_ON_A_GPU)
    limit_s = options.limit_s or CASE_LIMIT_S[options.device]
    begin = time.monotonic()
    end = begin + (math.inf if options.device == "cpu" else LIMIT_S)
    result = provenance.provenance() | {"device": options.device, "passed": False, "left_out": left_out}
    result["cases"] = asyncio.run(run_cases(cases, options.device, jobs, limit_s, end))
    result["passed"] = bool(cases) and all(case["passed"] for case in result["cases"].values())
    result["seconds"] = round(time.monotonic() - begin, 1)
    provenance.write(options.out, result)
    print(f"{'all passed' if result['passed'] else 'FAILED'}; written to {options.out}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)  # whatever the helpers of multiprocessing do
