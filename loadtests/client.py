"""HTTP client for users in greenlets, on geventhttpclient (like Locust's own FastHttpUser).

FastHttpUser passes a stream on in blocks of one kilobyte, which hold many tokens: times would be wrong.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPParseError, HTTPSocketResponse
from sseclient import SSEClient

from loadtests.answer import DONE, StreamedAnswer, StreamError

#: Without a byte from the server for this long a request has failed.
READ_TIMEOUT_S = 120.0

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


class StreamingClient:
    """Requests to one server, each on a connection of its own, so that no user waits for another's.

    Args:
        url: Scheme, host and port.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def json(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Sends a GET, or a POST if there is a body.

        Raises:
            StreamError: No answer, or a status other than 200.
        """
        payload = None if body is None else json.dumps(body)
        with self._opened(path, payload, {}) as response:
            answer: dict[str, Any] = json.loads(response.read())
        return answer

    def stream(self, api: str, payload: str, headers: dict[str, str], answer: StreamedAnswer) -> None:
        """Adds chunks to `answer` until the stream ends.

        Args:
            payload: The body as JSON, encoded beforehand so that the encoding is not measured.

        Raises:
            StreamError: No answer, a status other than 200, or a malformed chunk.
        """
        with self._opened(PATHS[api], payload, headers) as response:
            lines = iter(lambda: response.readline(b"\n"), b"")  # each as soon as it is received
            for event in SSEClient(lines).events():
                now = time.perf_counter()
                if event.data == DONE:
                    answer.done = True
                else:
                    answer.add(json.loads(event.data), now)

    @contextlib.contextmanager
    def _opened(
        self, path: str, payload: str | None, headers: dict[str, str]
    ) -> Iterator[HTTPSocketResponse]:
        client = HTTPClient.from_url(
            self._url, connection_timeout=READ_TIMEOUT_S, network_timeout=READ_TIMEOUT_S, insecure=True
        )
        method = "GET" if payload is None else "POST"
        try:
            response = client.request(method, path, body=payload or "", headers=self._headers | headers)
            if response.status_code != 200:
                raise StreamError(
                    f"HTTP {response.status_code}", response.read().decode(errors="replace")[:300]
                )
            yield response
        except (OSError, HTTPParseError) as error:
            raise StreamError(f"connection failed: {type(error).__name__}", str(error)) from error
        except json.JSONDecodeError as error:
            raise StreamError("a chunk is no JSON", str(error)) from error
        finally:
            client.close()
