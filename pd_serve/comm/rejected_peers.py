"""Logs rejected peers: connections without the cluster's secret, which ZeroMQ refuses. Once per address."""

import logging
import socket
from collections.abc import Coroutine
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

logger = logging.getLogger(__name__)

FAILURES = (
    zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
)

#: Addresses that are remembered. Peers at further addresses are refused without a log line.
MAX_ADDRESSES = 1000


class RejectedPeerLog:
    """The refused connections of one process.

    Args:
        name: Name of the process, for the log.
        fallback: Logged in place of an address that is unknown because the connection is closed already.
    """

    def __init__(self, name: str, fallback: str) -> None:
        self._name = name
        self._fallback = fallback
        self._seen: set[str] = set()

    def watch(self, listener: zmq.asyncio.Socket) -> Coroutine[Any, Any, None]:
        """Call before the socket is bound. Returns a coroutine to run as long as it is open."""
        events = FAILURES | zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED
        return self._read(listener.get_monitor_socket(events))

    async def _read(self, monitor: zmq.asyncio.Socket) -> None:
        """Matches failures to addresses.

        A failure event does not name its connection. The disconnect event, which does, follows at once: one
        thread of libzmq sends both. Source: libzmq 4.3.5, stream_engine_base.cpp, error.
        """
        peers: dict[int, str] = {}
        failed = False
        while True:
            message = await recv_monitor_message(monitor)
            event, descriptor = message["event"], message["value"]
            if event == zmq.Event.ACCEPTED:
                peers[descriptor] = _peer_of(descriptor) or self._fallback
            elif event == zmq.Event.DISCONNECTED:
                peer = peers.pop(descriptor, self._fallback)
                if failed:
                    self._note(peer)
                failed = False
            else:
                failed = True

    def _note(self, peer: str) -> None:
        if peer in self._seen or len(self._seen) >= MAX_ADDRESSES:
            return
        self._seen.add(peer)
        logger.warning(
            "%s: refused a peer at %s, which does not have this cluster's secret;"
            " further ones there are refused without a log line",
            self._name,
            peer,
        )


def _peer_of(descriptor: int) -> str | None:
    """Address of a connection's peer; None if libzmq has closed the connection meanwhile."""
    try:
        with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as connection:
            return str(connection.getpeername()[0])
    except OSError:
        return None
