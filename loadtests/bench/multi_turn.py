"""`bench multi-turn`: vLLM's own benchmark of conversations, against plain vLLM and against pd-serve.

The load and the latencies are those of `benchmark_serving_multi_turn.py` in `benchmarks/multi_turn` of vLLM's
source package. Here the arms are started in turns, and their answers compared: all decode greedily, so the
conversations of each arm should be those of plain vLLM.
"""

import asyncio
import json
import random
import string
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from loadtests.bench import compare_tables
from loadtests.bench.arms import CACHE_AWARE, CONDITIONAL, DEFAULTS, PLAIN, TITLES, Arm, ArmBuilder
from loadtests.bench.clients import run_round
from loadtests.bench.compare import (
    ENGINE,
    WARM_UP,
    check_memory,
    install_routers,
    router_versions,
    running_arm,
    total_cpu_s,
    turns,
)
from loadtests.bench.report import BenchmarkReport
from loadtests.servers import MODEL, SharedSettings, free_port
from loadtests.terminal import new_progress
from pd_serve.errors import PdServeError

ARMS = (PLAIN, CACHE_AWARE, DEFAULTS, CONDITIONAL)

#: Clients, and the conversations that are open at a time.
NUM_CLIENTS, ACTIVE = 6, 12

#: Time limit for an arm to give all blocks back after the load, in seconds.
REST_TIMEOUT_S = 15.0

#: The numbers that have a ratio to those of plain vLLM.
FIGURES = ("first_ttft_p50_ms", "later_ttft_p50_ms", "later_ttft_p99_ms", "tpot_p50_ms", "latency_p50_ms")


def conversations(num_conversations: int, text_file: str) -> dict[str, Any]:
    """The benchmark's input: as vLLM's example, at the size of a model with 4,096 tokens."""

    def uniform(least: int, most: int) -> dict[str, Any]:
        return {"distribution": "uniform", "min": least, "max": most}

    return {
        "filetype": "generate_conversations",
        "num_conversations": num_conversations,
        "text_files": [text_file],
        "prompt_input": {
            "num_turns": uniform(6, 10),
            "common_prefix_num_tokens": {"distribution": "constant", "value": 250},
            "prefix_num_tokens": {"distribution": "lognormal", "average": 500, "max": 1500},
            "num_tokens": uniform(120, 160),
        },
        "prompt_output": {"num_tokens": uniform(80, 120)},
    }


async def run(
    report: BenchmarkReport, script: Path, *, size: int, rounds: int, num_conversations: int
) -> None:
    """Measures, shows a table and writes the numbers. Takes about three minutes for each round.

    Args:
        script: vLLM's `benchmark_serving_multi_turn.py`, with its neighbours. It needs `pandas`.
        size: Number of engines of each arm.
        num_conversations: In each round; other ones in every round.

    Raises:
        PdServeError: A process did not start, memory is short, the script failed, or an arm has lost blocks.
    """
    routers_folder = await install_routers(report.console)
    report.provenance["versions"] |= router_versions()
    check_memory(size)
    greedy = json.dumps({"temperature": 0.0}, separators=(",", ":"))
    settings = SharedSettings.of_this_machine(size, **ENGINE, override_generation_config=greedy)
    arms = [arm for arm in ArmBuilder(settings, routers_folder, free_port).all_arms(size) if arm.name in ARMS]
    measured: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder, new_progress(report.console) as progress:
        task = progress.add_task("", total=rounds * len(arms))
        for number in range(rounds):
            load = _write_load(Path(folder), number, num_conversations)
            for arm in turns(arms, number):
                progress.update(task, description=f"round {number + 1}: {arm.name}", refresh=True)
                measured[arm.name].append(await _measure(arm, script, settings.model, load, number))
                progress.advance(task)
    numbers = {name: summary(rounds_, measured[PLAIN]) for name, rounds_ in measured.items()}
    report.show(compare_tables.conversations(size, numbers, TITLES))
    report.write(
        {
            "engines": size,
            "engine": ENGINE,
            "clients": NUM_CLIENTS,
            "active_conversations": ACTIVE,
            "load": conversations(num_conversations, "words.txt"),
            "arms": numbers,
        }
    )


def _write_load(folder: Path, number: int, num_conversations: int) -> Path:
    """Writes the input of a round, with a text of its own: words of random letters."""
    draw = random.Random(number)
    words = ("".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(60_000))
    text = folder / f"words-{number}.txt"
    text.write_text(" ".join(words))
    load = folder / f"load-{number}.json"
    load.write_text(json.dumps(conversations(num_conversations, str(text))))
    return load


async def _measure(arm: Arm, script: Path, model: str, load: Path, number: int) -> dict[str, Any]:
    """One arm under one round's load: the script's requests and the conversations that came of them."""
    requests, answers = (
        load.with_name(f"{arm.name}-requests.json"),
        load.with_name(f"{arm.name}-answers.json"),
    )
    async with running_arm(arm) as servers:
        url = servers[-1].url
        await run_round(url, total_cpu_s(servers), WARM_UP, seed=-1)
        flags = {
            "input-file": load,
            "output-file": answers,
            "stats-json-output": requests,
            "seed": number,
            "model": model,
            "served-model-name": MODEL,
            "url": url,
            "num-clients": NUM_CLIENTS,
            "max-active-conversations": ACTIVE,
        }
        command = [str(script), "--no-early-stop", *(f"--{name}={value}" for name, value in flags.items())]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode or not requests.is_file():
            last = output.decode(errors="replace").strip().splitlines()[-1:]
            raise PdServeError(f"{script.name} failed against {arm.name}: {' '.join(last)}")
        if arm.router is None:
            await _check_rest(url)
    measured = {"requests": json.loads(requests.read_text()), "answers": json.loads(answers.read_text())}
    for file in (requests, answers):
        file.unlink()
    return measured


async def _check_rest(url: str) -> None:
    """Raises: PdServeError: Blocks, pins or requests are left, or the processes differ."""
    problems = ["no answer"]
    async with aiohttp.ClientSession() as session:
        for _ in range(int(REST_TIMEOUT_S)):
            async with session.get(f"{url}/cluster/integrity") as response:
                found = await response.json()
            problems = found.get("violations", [str(found)])
            if not problems:
                return
            await asyncio.sleep(1.0)
    raise PdServeError(f"GET /cluster/integrity: {problems[0]}")


def summary(rounds: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers over all requests, the median of the rounds' ratios, and the answers that are plain vLLM's."""
    pairs = [(figures(a["requests"]), figures(b["requests"])) for a, b in zip(rounds, plain, strict=True)]
    equal = []
    for a, b in zip(rounds, plain, strict=True):
        one, other = _whole(a), _whole(b)
        if _ids(a) != _ids(b):
            raise ValueError("an arm has lost a conversation")
        equal += [one[name] == other[name] for name in sorted(one.keys() & other.keys())]
    return {
        "figures": figures([request for one in rounds for request in one["requests"]]),
        "rounds": [a for a, _ in pairs],
        "ratio_to_round_robin": {
            name: round(float(np.median([a[name] / b[name] for a, b in pairs])), 3) for name in FIGURES
        },
        "equal_conversations": [sum(equal), len(equal)],
    }


def _ids(measured: Mapping[str, Any]) -> list[str]:
    return sorted(str(one["id"]) for one in measured["answers"])


def _whole(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The messages of the conversations that were led to their end, by id.

    The script leaves the last ones when it has no new one to begin, and writes these as they were made.
    """
    answered = Counter(str(request["conversation_id"]) for request in measured["requests"])
    messages = {str(one["id"]): one["messages"] for one in measured["answers"]}
    return {name: texts for name, texts in messages.items() if 2 * answered[name] == len(texts)}


def figures(requests: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Latencies in ms; those of first turns have one message in the prompt."""
    first = [one["ttft_ms"] for one in requests if one["input_num_turns"] == 1]
    later = [one["ttft_ms"] for one in requests if one["input_num_turns"] > 1]
    columns = {
        "first_ttft": first,
        "later_ttft": later,
        "tpot": [one["tpot_ms"] for one in requests],
        "latency": [one["latency_ms"] for one in requests],
    }
    found: dict[str, float] = {"requests": len(requests)}
    for name, values in columns.items():
        for part in (50, 99):
            found[f"{name}_p{part}_ms"] = round(float(np.percentile(values, part)), 2)
    return found
