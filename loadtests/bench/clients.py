"""Clients of the benchmarks: streaming completions in an open or a closed loop."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import aiohttp

from loadtests.bench.load import Load
from loadtests.bench.rounds import Round
from loadtests.outcome import Outcome
from loadtests.servers import MODEL, RunningServer
from pd_serve.simulation.config import TraceRequest

#: A request that takes longer has failed.
REQUEST_TIMEOUT_S = 120.0

#: Tokens of the demo model that are one lower-case letter each.
LETTERS = list(range(ord("a"), ord("z") + 1))

Request = tuple[TraceRequest, str | list[int]]


async def run_round(url: str, cpu_s: Callable[[], float], load: Load, seed: int) -> Round:
    """Sends one round's requests. A failed request is an outcome of the round, and the last of its session.

    Args:
        url: The server that the requests go to.
        cpu_s: CPU time of the measured processes so far.
        seed: The same seed sends the same prompts at the same times.
    """
    requests = list(zip(load.requests(seed), load.prompts(seed), strict=True))
    load_average = os.getloadavg()[0]
    # New connections for every round: servers close those that were idle during another server's turn.
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    ) as session:
        cpu_before_s, begin = cpu_s(), time.perf_counter()
        if load.rate is None:
            outcomes = await _closed_loop(session, url, requests, load)
        else:
            outcomes = await _open_loop(session, url, requests, load, begin)
        seconds = time.perf_counter() - begin
    used_s = cpu_s() - cpu_before_s
    return Round(round(seconds, 3), round(used_s, 3), round(load_average, 2), outcomes)


async def run_checked_round(server: RunningServer, load: Load, seed: int) -> Round:
    """One round on one server, with the CPU time of all its processes.

    Raises:
        PdServeError: A request failed, or brought another number of tokens than requested.
    """
    measured = await run_round(server.url, server.cpu_s, load, seed)
    measured.check(server.url)
    return measured


async def _open_loop(
    session: aiohttp.ClientSession, url: str, requests: Sequence[Request], load: Load, begin: float
) -> list[Outcome]:
    tasks = []
    async with asyncio.TaskGroup() as clients:
        for number, request in enumerate(requests):
            await asyncio.sleep(max(0.0, begin + request[0].arrival_s - time.perf_counter()))
            tasks.append(clients.create_task(_complete(session, url, number, request, load)))
    return [outcome for outcome, _ in map(asyncio.Task.result, tasks)]


async def _closed_loop(
    session: aiohttp.ClientSession, url: str, requests: Sequence[Request], load: Load
) -> list[Outcome]:
    remaining: Iterator[int] = iter(range(0, len(requests), load.turns))  # first turns
    outcomes: list[Outcome] = []

    async def client() -> None:
        for first in remaining:
            text: str | None = None
            for number in range(first, first + load.turns):
                wanted, prompt = requests[number]
                if text is not None and isinstance(prompt, str):
                    prompt = text + prompt
                found, answer = await _complete(session, url, number, (wanted, prompt), load)
                outcomes.append(found)
                if found.error is not None or not isinstance(prompt, str):
                    break
                text = prompt + answer

    async with asyncio.TaskGroup() as clients:
        for _ in range(load.num_clients):
            clients.create_task(client())
    return outcomes


async def _complete(
    session: aiohttp.ClientSession, url: str, number: int, request: Request, load: Load
) -> tuple[Outcome, str]:
    """One greedy answer of the full length, and its text, asked for by vLLM's own benchmark functions."""
    from vllm.benchmarks.lib.endpoint_request_func import (
        RequestFuncInput,
        async_request_openai_chat_completions,
        async_request_openai_completions,
    )

    wanted, prompt = request
    as_chat, sampling = load.as_chat, dict[str, Any](temperature=0.0)
    if load.turns > 1:
        sampling |= {"allowed_token_ids": LETTERS}  # the answer in the next prompt is the same tokens again
    arguments = RequestFuncInput(
        prompt=prompt,
        api_url=f"{url}/v1/chat/completions" if as_chat else f"{url}/v1/completions",
        prompt_len=wanted.prompt_tokens,
        output_len=wanted.output_tokens,
        model=MODEL,
        ignore_eos=True,
        extra_body=sampling,
    )
    ask = async_request_openai_chat_completions if as_chat else async_request_openai_completions
    output = await ask(arguments, session)
    error: str | None = None
    if not output.success:
        error = next(reversed(output.error.strip().splitlines()), "no answer")
    elif output.output_tokens != wanted.output_tokens:
        error = f"{output.output_tokens} tokens received instead of {wanted.output_tokens}"
    outcome = Outcome(
        number=number,
        tokens=output.output_tokens or 0,
        ttft_s=output.ttft,
        gaps_s=tuple(output.itl),
        e2e_s=output.latency,
        at_s=wanted.arrival_s,
        prompt_tokens=wanted.prompt_tokens,
        error=error,
        is_later_turn=wanted.turn_of is not None,
    )
    return outcome, output.generated_text
