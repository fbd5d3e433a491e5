"""More than a service can take: others are served meanwhile, and its limits answer clearly."""

import asyncio
import json
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from loadtests.answer import DONE, StreamedAnswer, StreamError
from loadtests.checked_load import CheckedLoad
from loadtests.servers import MODEL
from loadtests.stream_client import BUSY, AsyncStreamClient
from loadtests.terminal import say

STREAMS, CONNECTIONS, PROMPTS, SLOW_READERS = 600, 5000, 1000, 20

#: Time for which slow readers read nothing, and for which connections are held.
SLOW_S, HELD_S = 20.0, 10.0

SLOW_TOKENS = 1000

#: A probe that takes longer was not served.
PROBE_S = 120.0

PROBE_PAUSE_S = 1.0


@dataclass(slots=True)
class Overload:
    """The cases, one after another, beside probes: short streams of another client, one at a time.

    Attributes:
        numbers: By case: its duration, and what the probes waited at most.
    """

    client: AsyncStreamClient
    url: str
    seed: int
    problems: list[str] = field(default_factory=list)
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    _longest_probe_s: float = 0.0
    _probes: int = 0

    async def run(self) -> None:
        """Returns when all cases have ended."""
        cases: dict[str, Callable[[], Awaitable[None]]] = {
            f"{STREAMS} streams": self._streams,
            f"{SLOW_READERS} slow readers": self._slow_readers,
            f"{CONNECTIONS} connections": self._connections,
            f"{PROMPTS} prompts in one request": self._prompts,
        }
        for name, case in cases.items():
            self._longest_probe_s, self._probes, began = 0.0, 0, time.perf_counter()
            probing = asyncio.create_task(self._probe(name))
            try:
                await case()
            except StreamError as error:
                self.problems.append(f"{name}: {error.text}")
            finally:
                probing.cancel()
                await asyncio.gather(probing, return_exceptions=True)
            self.numbers[name] = {
                "seconds": round(time.perf_counter() - began, 1),
                "probes": self._probes,
                "longest_probe_s": round(self._longest_probe_s, 2),
            }
            say(f"{name}: {self.numbers[name]}")

    async def _probe(self, name: str) -> None:
        """A client that sends one short request after another."""
        dice = random.Random(f"probe {self.seed}")
        while True:
            began, answer = time.perf_counter(), StreamedAnswer()
            try:
                async with asyncio.timeout(PROBE_S):
                    await self.client.stream_patiently("completions", _body(dice, 16, 8), answer)
                if len(answer.token_ids) != 8:
                    self.problems.append(f"{name}: a probe got {len(answer.token_ids)} of 8 tokens")
                self._probes += 1
            except TimeoutError:
                self.problems.append(f"{name}: a probe was not served within {PROBE_S:.0f} s")
            except StreamError as error:
                self.problems.append(f"{name}: a probe: {error.text}")
            self._longest_probe_s = max(self._longest_probe_s, time.perf_counter() - began)
            await asyncio.sleep(PROBE_PAUSE_S)

    async def _streams(self) -> None:
        """All are served in the end; those that are refused know when to come back."""
        load = CheckedLoad(self.client, self.seed, STREAMS, 8)
        await load.take_references()
        load.start(apart_s=0.0)
        await asyncio.sleep(1.0)
        if left := await load.stop(900.0):
            self.problems.append(f"{left} of {STREAMS} streams did not end")
        for record in load.failed():
            self.problems.append(f"one of {STREAMS} streams: {record.outcome.error}: {record.outcome.detail}")

    async def _slow_readers(self) -> None:
        """They get all their tokens when they read at last."""
        dice = random.Random(f"slow {self.seed}")

        async def read_late() -> None:
            answer = await _read_slowly(self.url, _body(dice, 16, SLOW_TOKENS), SLOW_S)
            if len(answer.token_ids) != SLOW_TOKENS or not answer.done:
                self.problems.append(f"a slow reader got {len(answer.token_ids)} of {SLOW_TOKENS} tokens")

        await asyncio.gather(*(read_late() for _ in range(SLOW_READERS)))

    async def _connections(self) -> None:
        """Connections that send nothing."""
        where = urlsplit(self.url)
        with ExitStack() as held:
            for number in range(CONNECTIONS):
                connection = held.enter_context(socket.socket())
                connection.setblocking(False)
                loop = asyncio.get_running_loop()
                try:
                    async with asyncio.timeout(30.0):
                        await loop.sock_connect(connection, (where.hostname, where.port))
                except (OSError, TimeoutError) as error:
                    self.problems.append(f"connection {number}: {error!r}")
                    return
            await asyncio.sleep(HELD_S)

    async def _prompts(self) -> None:
        """One request with many prompts is answered as a whole, or refused with a reason."""
        dice = random.Random(f"prompts {self.seed}")
        body = _body(dice, 8, 2) | {"prompt": [_prompt(dice, 8) for _ in range(PROMPTS)], "stream": False}
        del body["stream_options"]
        try:
            answer: dict[str, Any] = await self.client.json("/v1/completions", body, 600.0)
        except StreamError as error:
            if (
                error.kind not in [f"HTTP {status}" for status in (400, *BUSY)]
                or "message" not in error.detail
            ):
                raise
            say(f"{PROMPTS} prompts are refused: {error.kind}: {error.detail:.160}")
            return
        if len(answer["choices"]) != PROMPTS:
            self.problems.append(f"{len(answer['choices'])} answers to {PROMPTS} prompts")


async def _read_slowly(url: str, body: dict[str, Any], pause_s: float) -> StreamedAnswer:
    """A stream of a client that reads nothing for a while after the head of the answer.

    Without chunks (HTTP/1.0) and with small buffers, so that the kernel takes little on its behalf.
    """
    where, payload = urlsplit(url), json.dumps(body).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (where.hostname, where.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=65536)
    head = (
        f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}"
    )
    writer.write(head.encode() + b"\r\n\r\n" + payload)
    answer = StreamedAnswer()
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            raise StreamError(f"a slow reader: {status.decode(errors='replace').strip()}")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(pause_s)
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        async for line in reader:
            data = line.strip().removeprefix(b"data:").strip()
            if not line.startswith(b"data:"):
                continue
            if data == DONE.encode():
                answer.done = True
            else:
                answer.add(json.loads(data), time.perf_counter())
    finally:
        writer.close()
    return answer


def _prompt(dice: random.Random, tokens: int) -> list[int]:
    return dice.choices(range(97, 123), k=tokens)


def _body(dice: random.Random, prompt_tokens: int, tokens: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": _prompt(dice, prompt_tokens),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
