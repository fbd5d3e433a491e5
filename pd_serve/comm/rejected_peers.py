"""Logs rejected peers: connections without the cluster's secret, which ZeroMQ refuses. Once per address.

Connections that end before that is known are logged apart, so that they hide no peer that is refused.
"""

import logging
import socket
from collections.abc import Coroutine
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

logger = logging.getLogger(__name__)

REFUSED = zmq.Event.HANDSHAKE_FAILED_AUTH | zmq.Event.HANDSHAKE_FAILED_PROTOCOL

#: The connection ended before its peer had shown whether it has the secret: a process of the cluster that
#: died, or a stranger. Source: libzmq 4.3.5, stream_engine_base.cpp, error.
LEFT = zmq.Event.HANDSHAKE_FAILED_NO_DETAIL

#: Addresses that are remembered, of each kind. Peers at further addresses cause no log line.
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
        self._refused: set[str] = set()
        self._left: set[str] = set()

    def watch(self, listener: zmq.asyncio.Socket) -> Coroutine[Any, Any, None]:
        """Call before the socket is bound. Returns a coroutine to run as long as it is open."""
        events = REFUSED | LEFT | zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED
        return self._read(listener.get_monitor_socket(events))

    async def _read(self, monitor: zmq.asyncio.Socket) -> None:
        """Matches failures to addresses.

        A failure event does not name its connection. The disconnect event, which does, follows at once: one
        thread of libzmq sends both. Source: libzmq 4.3.5, stream_engine_base.cpp, error.
        """
        peers: dict[int, str] = {}
        failure = 0
        while True:
            message = await recv_monitor_message(monitor)
            event, descriptor = message["event"], message["value"]
            if event == zmq.Event.ACCEPTED:
                peers[descriptor] = _peer_of(descriptor) or self._fallback
            elif event == zmq.Event.DISCONNECTED:
                peer = peers.pop(descriptor, self._fallback)
                if failure & REFUSED:
                    self._note_refused(peer)
                elif failure:
                    self._note_left(peer)
                failure = 0
            else:
                failure = event

    def _note_refused(self, peer: str) -> None:
        if _is_new(peer, self._refused):
            logger.warning(
                "%s: refused a peer at %s, which does not have this cluster's secret;"
                " further ones there are refused without a log line",
                self._name,
                peer,
            )

    def _note_left(self, peer: str) -> None:
        if _is_new(peer, self._left):
            logger.info(
                "%s: a peer at %s left before it had shown this cluster's secret;"
                " further ones there do so without a log line",
                self._name,
                peer,
            )


def _is_new(peer: str, known: set[str]) -> bool:
    """Remembers an address, if there is room. Returns whether it was not known."""
    if peer in known or len(known) >= MAX_ADDRESSES:
        return False
    known.add(peer)
    return True


def _peer_of(descriptor: int) -> str | None:
    """Address of a connection's peer; None if libzmq has closed the connection meanwhile."""
    try:
        with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as connection:
            return str(connection.getpeername()[0])
    except OSError:
        return None
