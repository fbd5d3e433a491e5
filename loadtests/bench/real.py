"""The real side of `pd-serve bench simulator`: `pd-serve serve` as it is, and clients over HTTP."""

import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from loadtests.bench.completion import complete, fault
from loadtests.bench.servers import Server, Settings
from loadtests.bench.workload import Latencies
from pd_serve.errors import PdServeError
from pd_serve.simulation.config import TraceRequest


@dataclass(frozen=True, slots=True)
class Cluster(Settings):
    """`pd-serve serve tiny` with nothing but these instances, by role."""

    instances: dict[str, int] = field(default_factory=dict)

    def command(self, name: str, port: int) -> list[str]:
        script = Path(sys.executable).with_name("pd-serve")
        roles = [f"--{role}={number}" for role, number in self.instances.items()]
        return [str(script), "serve", self.model, *roles, "--host=127.0.0.1", f"--port={port}", *self.flags]


@dataclass(frozen=True, slots=True)
class Observed:
    """Attributes:
    cores: That all processes of the service kept busy together, on average.
    tokens_per_message: Above 1 where tokens came together: the server or the client was late.
    """

    latencies: Latencies
    cores: float
    tokens_per_message: float


async def observe(server: Server, requests: Sequence[TraceRequest], seed: int) -> Observed:
    """Sends every request at its time, whatever becomes of the others. The same seed sends the same prompts.

    Raises:
        PdServeError: A request failed, or brought another number of tokens than asked for.
    """
    dice = random.Random(f"prompts {seed}")
    prompts = [[dice.randrange(97, 123) for _ in range(request.prompt_tokens)] for request in requests]
    cpu_s, begin = server.cpu_s(), time.perf_counter()
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
        asyncio.TaskGroup() as clients,
    ):
        tasks = []
        for request, prompt in zip(requests, prompts, strict=True):
            await asyncio.sleep(max(0.0, begin + request.arrival_s - time.perf_counter()))
            tasks.append(clients.create_task(_send(server, session, request, prompt)))
    seconds, cpu_s = time.perf_counter() - begin, server.cpu_s() - cpu_s
    seen = Latencies()
    for task in tasks:
        output = task.result()
        seen.request_s.append(output.latency)
        seen.ttft_s.append(output.ttft)
        seen.itl_s += output.itl
    num_gaps = sum(request.output_tokens - 1 for request in requests)
    return Observed(seen, round(cpu_s / seconds, 2), round(num_gaps / len(seen.itl_s), 3))


async def _send(
    server: Server, session: aiohttp.ClientSession, request: TraceRequest, prompt: list[int]
) -> Any:
    output = await complete(
        session, server.url, prompt, prompt_tokens=request.prompt_tokens, output_tokens=request.output_tokens
    )
    if wrong := fault(output, request.output_tokens):
        raise PdServeError(f"a request to {server.url} failed: {wrong}")
    return output
