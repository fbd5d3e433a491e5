"""Clients of the benchmarks: streaming completions in an open or a closed loop."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence

import aiohttp

from loadtests.bench.load import Load
from loadtests.bench.rounds import Round
from loadtests.outcome import Outcome
from loadtests.servers import MODEL, RunningServer
from pd_serve.simulation.config import TraceRequest

#: A request that takes longer has failed.
REQUEST_TIMEOUT_S = 120.0

Request = tuple[TraceRequest, str | list[int]]


async def run_round(url: str, cpu_s: Callable[[], float], load: Load, seed: int) -> Round:
    """Sends one round's requests. A failed request is an outcome of the round.

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
            tasks.append(clients.create_task(_complete(session, url, number, request, load.as_chat)))
    return [task.result() for task in tasks]


async def _closed_loop(
    session: aiohttp.ClientSession, url: str, requests: Sequence[Request], load: Load
) -> list[Outcome]:
    remaining: Iterator[tuple[int, Request]] = iter(enumerate(requests))
    outcomes: list[Outcome] = []

    async def client() -> None:
        for number, request in remaining:
            outcomes.append(await _complete(session, url, number, request, load.as_chat))

    async with asyncio.TaskGroup() as clients:
        for _ in range(load.num_clients):
            clients.create_task(client())
    return outcomes


async def _complete(
    session: aiohttp.ClientSession, url: str, number: int, request: Request, as_chat: bool
) -> Outcome:
    """One greedy answer of the full length, asked for by vLLM's own benchmark functions."""
    from vllm.benchmarks.lib.endpoint_request_func import (
        RequestFuncInput,
        async_request_openai_chat_completions,
        async_request_openai_completions,
    )

    wanted, prompt = request
    arguments = RequestFuncInput(
        prompt=prompt,
        api_url=f"{url}/v1/chat/completions" if as_chat else f"{url}/v1/completions",
        prompt_len=wanted.prompt_tokens,
        output_len=wanted.output_tokens,
        model=MODEL,
        ignore_eos=True,
        extra_body={"temperature": 0.0},
    )
    ask = async_request_openai_chat_completions if as_chat else async_request_openai_completions
    output = await ask(arguments, session)
    error: str | None = None
    if not output.success:
        error = next(reversed(output.error.strip().splitlines()), "no answer")
    elif output.output_tokens != wanted.output_tokens:
        error = f"{output.output_tokens} tokens received instead of {wanted.output_tokens}"
    return Outcome(
        number=number,
        tokens=output.output_tokens or 0,
        ttft_s=output.ttft,
        gaps_s=tuple(output.itl),
        e2e_s=output.latency,
        at_s=wanted.arrival_s,
        prompt_tokens=wanted.prompt_tokens,
        error=error,
    )
