"""Instances are scaled, renewed and replaced under load, and no request notices. Engines are simulated."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import run_command
from tests.e2e.completion_client import Answer, Body, CompletionClient
from tests.e2e.conftest import run_cluster
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess, pd_serve
from tests.e2e.test_same_output import assert_same

#: A new instance is a new process that imports vLLM, beside whatever else this machine does.
START_S = 180.0

BODIES: list[Body] = [{"prompt": token_ids(150, i), "max_tokens": 200} for i in range(4)]


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[ServerProcess]:
    flags = ("--engine", "simulated", "--prefill", "1", "--decode", "1")
    with run_cluster(logs / "operator_commands.log", *flags) as server:
        yield server


@asynccontextmanager
async def load(client: CompletionClient) -> AsyncIterator[list[Answer]]:
    """Each body again and again; every answer has to be the first one, token by token."""
    expected = await asyncio.gather(*map(client.answer, BODIES))
    done = asyncio.Event()
    had: list[Answer] = []

    async def ask(number: int) -> None:
        while not done.is_set():
            had.append(await client.stream(BODIES[number]))
            assert_same(had[-1], expected[number])

    async with asyncio.TaskGroup() as group:
        for number in range(len(BODIES)):
            group.create_task(ask(number))
        try:
            yield had
        finally:
            done.set()


async def command(server: ServerProcess, *arguments: str) -> tuple[int, str]:
    """Exit code and output of a command to the running service."""
    return await run_command(*pd_serve(*arguments, "--url", server.url), bound_s=500.0)


def ready(cluster: dict[str, Any]) -> list[str]:
    return [row["id"] for row in cluster["instances"] if row["state"] == "ready"]


async def test_streams_stay_whole_while_pools_are_scaled_and_restarted(
    client: CompletionClient, server: ServerProcess
) -> None:
    async with load(client) as had:
        assert (await command(server, "scale", "decode=2"))[0] == 0
        await client.until(lambda cluster: "decode-1" in ready(cluster), START_S)

        code, output = await command(server, "restart")
        assert code == 0, output
        assert "1 of 3 done" in output
        cluster = await client.cluster()
        assert {row["id"] for row in cluster["instances"]} == {"prefill-1", "decode-2", "decode-3"}

        assert (await command(server, "scale", "decode=1"))[0] == 0
        await client.until(lambda cluster: len(cluster["instances"]) == 2, START_S)
        assert had
    assert await client.metric("pd_serve_recomputed_requests_total") == 0


async def test_a_dead_instance_is_replaced_under_load(client: CompletionClient) -> None:
    async with load(client):
        (row,) = [row for row in (await client.cluster())["instances"] if row["role"] == "decode"]
        os.kill(row["pid"], signal.SIGKILL)
        await client.until(lambda cluster: row["id"] not in ready(cluster))
        cluster = await client.until(lambda cluster: len(ready(cluster)) == 2, START_S)
        assert f"in the place of {row['id']}, which has died" in str(cluster["decisions"])


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("scale", "decode=0"), 1, "prefill and decode instances need each other"),
        (("scale", "encode=1"), 2, "no role 'encode'"),
        (("scale", "decode"), 2, "must be ROLE=N"),
        (("drain", "decode-99"), 1, "no instance 'decode-99'"),
        (("drain", "prefill-1"), 1, "the last instance that takes new requests"),
    ],
)
async def test_an_impossible_command_is_refused_with_its_reason(
    client: CompletionClient, server: ServerProcess, arguments: tuple[str, ...], code: int, says: str
) -> None:
    found, output = await command(server, *arguments)
    assert (found, says in output) == (code, True), output
