"""HTTP client for streams on asyncio. It is as patient as OpenAI's clients: a refusal is tried again."""

import asyncio
import json
import time
from typing import Any

import aiohttp

from loadtests.answer import DONE, StreamedAnswer, StreamError

#: Without a byte from the server for this long a request has failed. No pause that the service promises to
#: bridge is longer.
READ_TIMEOUT_S = 150.0

#: Statuses that ask the client to come back later, and the limits of the wait.
BUSY = (429, 503)
MAX_RETRY_AFTER_S = 5.0
MAX_REFUSED_S = 180.0

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


class RefusedError(StreamError):
    """The service is busy and names a time after which to try again."""

    def __init__(self, status: int, retry_after_s: float, detail: str) -> None:
        super().__init__(f"HTTP {status}", detail)
        self.retry_after_s = retry_after_s


class AsyncStreamClient:
    """Requests to one service, each on a connection of its own. Used as an asynchronous context manager."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key is not None else {}

    async def __aenter__(self) -> "AsyncStreamClient":
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=READ_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=self._headers, read_bufsize=2**20
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def json(
        self, path: str, body: dict[str, Any] | None = None, timeout_s: float = READ_TIMEOUT_S
    ) -> dict[str, Any]:
        """Sends a GET, or a POST if there is a body.

        Raises:
            StreamError: No answer, or an error status.
        """
        method = "GET" if body is None else "POST"
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, self._url + path, json=body, timeout=timeout
            ) as response:
                if response.status >= 400:
                    raise StreamError(f"HTTP {response.status}", (await response.text())[:300])
                answer: dict[str, Any] = await response.json()
                return answer
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise StreamError(f"connection failed: {type(error).__name__}", str(error)) from error

    async def stream(
        self, api: str, body: dict[str, Any], answer: StreamedAnswer, headers: dict[str, str] | None = None
    ) -> None:
        """Adds chunks to `answer` until the stream ends.

        Raises:
            RefusedError: The service is busy.
            StreamError: No answer, another status than 200, or a malformed chunk.
        """
        try:
            async with self._session.post(self._url + PATHS[api], json=body, headers=headers) as response:
                if response.status != 200:
                    detail = (await response.text())[:300]
                    if response.status in BUSY and "Retry-After" in response.headers:
                        raise RefusedError(response.status, float(response.headers["Retry-After"]), detail)
                    raise StreamError(f"HTTP {response.status}", detail)
                async for line in response.content:
                    data = line.strip().removeprefix(b"data:").strip()
                    if data == DONE.encode():
                        answer.done = True
                    elif data:
                        answer.add(json.loads(data), time.perf_counter())
        except json.JSONDecodeError as error:
            raise StreamError("a chunk is no JSON", str(error)) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise StreamError(f"connection failed: {type(error).__name__}", str(error)) from error

    async def stream_patiently(
        self, api: str, body: dict[str, Any], answer: StreamedAnswer, headers: dict[str, str] | None = None
    ) -> int:
        """Like `stream`, but tries again as long as the service is busy, for at most `MAX_REFUSED_S`.

        Returns:
            The number of refusals.

        Raises:
            StreamError: As `stream`.
        """
        refusals, deadline = 0, time.perf_counter() + MAX_REFUSED_S
        while True:
            try:
                await self.stream(api, body, answer, headers)
                return refusals
            except RefusedError as refused:
                if time.perf_counter() > deadline:
                    raise
                refusals += 1
                await asyncio.sleep(min(refused.retry_after_s, MAX_RETRY_AFTER_S))
