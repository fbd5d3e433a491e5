"""Sends tokens from the step thread to the API servers, one message per step and API server."""

import logging
from typing import TYPE_CHECKING

import msgspec
import zmq

from pd_serve.comm.messages import TokenHeader
from pd_serve.comm.wire import Wire

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs

logger = logging.getLogger(__name__)


class TokenPublisher:
    """Sends a step's outputs. Used on the step thread only, except for `close`."""

    def __init__(self, name: str, wire: Wire) -> None:
        from vllm.v1.serial_utils import MsgpackEncoder

        self._name = name
        self._wire = wire
        self._encoder = MsgpackEncoder()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}

    def publish(self, client: str, outputs: "EngineCoreOutputs", spans: list[tuple[int, int]]) -> None:
        """Sends a step's outputs to the token endpoint `client`; see `TokenHeader` for `spans`."""
        socket = self._sockets.get(client)
        if socket is None:
            socket = self._sockets[client] = self._wire.publisher(client)
        frames = [msgspec.msgpack.encode(TokenHeader(self._name, spans)), *self._encoder.encode(outputs)]
        try:
            socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("the API server at %s does not read its tokens", client)

    def close(self) -> None:
        """Closes the sockets. Call it after the step thread has ended and before the wire is closed."""
        for publisher in self._sockets.values():
            publisher.close(linger=0)
