"""Sends tokens from the step thread to the API servers, one message per step and API server."""

from collections.abc import Collection, Sequence
from typing import Any

import msgspec
import zmq

from migration.token_span import TokenSpan
from pd_serve.comm.messages import RequestReport, TokenHeader
from pd_serve.comm.wire import Wire


class TokenPublisher:
    """Sends a step's outputs, and reports of requests. Used on the step thread only, except for `close`."""

    def __init__(self, name: str, wire: Wire) -> None:
        self._name = name
        self._wire = wire
        self._sockets: dict[str, zmq.Socket[bytes]] = {}

    def publish(self, client: str, outputs: Sequence[Any], spans: list[TokenSpan]) -> None:
        """Sends a step's outputs, encoded as frames, to the token endpoint `client`; see `TokenHeader`."""
        self._send(client, TokenHeader(self._name, spans), outputs)

    def report(self, client: str, report: RequestReport) -> None:
        """Sends a report to the token endpoint `client`, after all outputs before it."""
        self._send(client, TokenHeader(self._name, [], report), ())

    def retain(self, clients: Collection[str]) -> None:
        """Closes the sockets, with their queues, to all other clients."""
        for client in self._sockets.keys() - clients:
            self._sockets.pop(client).close(linger=0)

    def close(self) -> None:
        """Closes the sockets. Call it after the step thread has ended and before the wire is closed."""
        self.retain(())

    def _send(self, client: str, header: TokenHeader, frames: Sequence[Any]) -> None:
        socket = self._sockets.get(client)
        if socket is None:
            socket = self._sockets[client] = self._wire.publisher(client)
        try:
            socket.send_multipart([msgspec.msgpack.encode(header), *frames], zmq.NOBLOCK)
        except zmq.Again:
            self._wire.unsent.queue_full(f"the API server at {client}", header)
