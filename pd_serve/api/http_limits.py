"""Limits on HTTP connections: their number, the size of headers, and the time to send them.

Uvicorn's fast parser enforces none of these, and vLLM's flags for headers only reach its slow one (h11), so
they are enforced here. `body_limit` limits bodies. Uvicorn buffers about 64 KiB of a response per connection;
then the stream waits for its client.

Source: uvicorn/protocols/http/httptools_impl.py, flow_control.py.
"""

import asyncio
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from pd_serve.api.errors import error_body

#: Maximum bytes per byte of a chunked body: b"1\r\nx\r\n", and room for leading zeros.
FRAMING = 8


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Limits for each connection, and on the number of connections.

    Attributes:
        header_bytes: Length of a request's line, headers and trailers together.
        num_headers: Number of headers of a request.
        num_connections: Number of open connections, at all API servers; further ones get 503.
        header_s: Time from the start of a connection, or of a further request, to the end of its headers.
        connections_elsewhere: Returns the number of open connections at the other API servers.
    """

    header_bytes: int
    num_headers: int
    num_connections: int
    header_s: float = 60.0
    connections_elsewhere: Callable[[], int] = lambda: 0


class LimitedProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP/1.1 connection with limits; beyond them it answers with an error and closes."""

    def __init__(self, limits: HttpLimits, **options: Any) -> None:
        super().__init__(**options)
        self._limits = limits
        self._refusal: tuple[HTTPStatus, str] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._received = self._body = 0  # bytes since the message began, and those of its body
        self._begun_with = 0
        self._cycles: deque[RequestResponseCycle] = deque()  # they are answered in order
        self._receiving: RequestResponseCycle | None = None  # the one whose body is not complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) + self._limits.connections_elsewhere() > self._limits.num_connections:
            return self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "Too many connections; try again later.")
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        # Uvicorn tells the last request only. The one that is being answered may be an earlier one.
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        self._received += len(data)
        self._begun_with = len(data)
        super().data_received(data)
        if self._received - FRAMING * self._body > self._limits.header_bytes:
            self._refuse(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"The headers of the request are longer than {self._limits.header_bytes} bytes.",
            )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._received, self._body = self._begun_with, 0
        self._start_timer()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._receiving = None
        self._begun_with = 0  # the rest of the data is the next request's, of unknown length

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > self._limits.num_headers:
            # The error stops the parser; uvicorn then calls `send_400_response`.
            self._refusal = (
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"The request has more than {self._limits.num_headers} headers.",
            )
            raise ValueError("too many headers")

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft()
        if self.cycle is not None:
            self._receiving = self.cycle
            self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        self._refuse(*(self._refusal or (HTTPStatus.BAD_REQUEST, msg)))

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(
            self._limits.header_s,
            self._refuse,
            HTTPStatus.REQUEST_TIMEOUT,
            f"The headers of a request have to come within {self._limits.header_s:g} s.",
        )

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Answers and closes; only closes if a response has started, or one to an earlier request is due."""
        self._refusal = (status, message)
        self._stop_timer()
        if self.transport.is_closing():
            return
        due = [cycle for cycle in self._cycles if not cycle.response_complete]
        if not due or (due == [self._receiving] and not due[0].response_started):
            for cycle in due:
                cycle.disconnected = True  # its handler has nothing to answer any more
                cycle.message_event.set()
            body = json.dumps(error_body(status, message)).encode()
            lines = [
                f"HTTP/1.1 {status.value} {status.phrase}",
                "content-type: application/json",
                f"content-length: {len(body)}",
                "connection: close",
                *(["retry-after: 1"] if status is HTTPStatus.SERVICE_UNAVAILABLE else []),
            ]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
