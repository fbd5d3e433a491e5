"""Clients of `pd-serve bench compare`: streaming completions in an open or a closed loop, failures noted."""

import asyncio
import os
import random
import time
from collections.abc import Iterator, Sequence
from string import ascii_lowercase
from typing import Protocol

import aiohttp

from loadtests.bench.completion import complete, fault
from loadtests.bench.seen import Answer, Load, Round
from pd_serve.simulation.config import TraceRequest

#: Of one request. Whatever takes longer has failed, not waited.
REQUEST_S = 120.0


class Worker(Protocol):
    """Something that uses CPU time."""

    def cpu_s(self) -> float:
        """So far."""


async def put_load(url: str, workers: Sequence[Worker], load: Load, seed: int) -> Round:
    """One round's load on one arm.

    Args:
        url: Where the requests go.
        workers: Whose CPU time counts.
        seed: The same one sends the same prompts at the same times.
    """
    requests = load.requests(seed)
    dice = random.Random(f"prompts {seed}")
    # Text, for some routers take no token ids; the demo model's tokens are bytes.
    prompts = ["".join(dice.choices(ascii_lowercase, k=request.prompt_tokens)) for request in requests]
    work = list(zip(requests, prompts, strict=True))
    load_average, cpu_s = os.getloadavg()[0], _cpu_s(workers)
    # New connections for every load: servers close those that were idle during another one's turn.
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=REQUEST_S)
    ) as session:
        begin = time.perf_counter()
        if load.rate is None:
            answers = await _closed(session, url, work, load.num_clients)
        else:
            answers = await _open(session, url, work, begin)
        seconds = time.perf_counter() - begin
    return Round(round(seconds, 3), round(_cpu_s(workers) - cpu_s, 3), round(load_average, 2), answers)


def _cpu_s(workers: Sequence[Worker]) -> float:
    return sum(worker.cpu_s() for worker in workers)


Work = Sequence[tuple[TraceRequest, str]]


async def _open(session: aiohttp.ClientSession, url: str, work: Work, begin: float) -> list[Answer]:
    tasks = []
    async with asyncio.TaskGroup() as clients:
        for request, prompt in work:
            await asyncio.sleep(max(0.0, begin + request.arrival_s - time.perf_counter()))
            tasks.append(clients.create_task(_send(session, url, request, prompt)))
    return [task.result() for task in tasks]


async def _closed(session: aiohttp.ClientSession, url: str, work: Work, num_clients: int) -> list[Answer]:
    left: Iterator[tuple[TraceRequest, str]] = iter(work)
    answers: list[Answer] = []

    async def client() -> None:
        for request, prompt in left:
            answers.append(await _send(session, url, request, prompt))

    async with asyncio.TaskGroup() as clients:
        for _ in range(num_clients):
            clients.create_task(client())
    return answers


async def _send(session: aiohttp.ClientSession, url: str, request: TraceRequest, prompt: str) -> Answer:
    output = await complete(
        session, url, prompt, prompt_tokens=request.prompt_tokens, output_tokens=request.output_tokens
    )
    wrong = fault(output, request.output_tokens)
    return Answer(output.ttft, tuple(output.itl), output.output_tokens or 0, wrong)
