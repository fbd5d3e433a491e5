"""Sends conversations to ports and judges what comes back."""

import asyncio
import random
import re
import socket
import struct
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from loadtests.fuzz.frames import Conversation, FrameMaker
from loadtests.fuzz.ports import HOST, ListeningPort, Protocol

#: Time to wait for an answer. A server that has refused a frame closes the connection at once.
ANSWER_S = {Protocol.ZMTP: 0.05, Protocol.HTTP: 0.5, Protocol.GRPC: 0.05, Protocol.SILENT: 0.02}

#: Bytes of an answer that are read.
MOST_BYTES = 1 << 16

SEND_S = 5.0

#: Share of the frames by protocol; those without a port are left out.
SHARES = {Protocol.ZMTP: 0.4, Protocol.SILENT: 0.3, Protocol.HTTP: 0.2, Protocol.GRPC: 0.1}

#: Answers of a server that has failed. 501, 503 and 505 are refusals.
_FAILED = re.compile(rb"HTTP/1\.[01] (500|502|504)")
_RESET = struct.pack("ii", 1, 0)


@dataclass(slots=True)
class FrameSender:
    """Counts what is sent, and keeps answers that a server should not give.

    Attributes:
        frames: Number of frames sent, by protocol.
        answered: Number of conversations with an answer, by protocol.
        unreachable: Number of connections that were refused, by port.
        findings: Descriptions of wrong answers, at most `MOST_FINDINGS`.
    """

    maker: FrameMaker
    key: str
    dice: random.Random
    frames: Counter[Protocol] = field(default_factory=Counter)
    answered: Counter[Protocol] = field(default_factory=Counter)
    unreachable: Counter[ListeningPort] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    async def converse(self, port: ListeningPort) -> None:
        """Sends one conversation on a connection of its own."""
        conversation = self.maker.conversation(port.protocol)
        loop = asyncio.get_running_loop()
        with socket.socket() as connection:
            connection.setblocking(False)
            try:
                async with asyncio.timeout(SEND_S):
                    await loop.sock_connect(connection, (HOST, port.number))
            except (OSError, TimeoutError):
                self.unreachable[port] += 1
                return
            # A reset leaves no connection behind that would occupy a port of this machine for a minute.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            answer = bytearray()
            with suppress(OSError, TimeoutError):
                for frame in conversation:
                    async with asyncio.timeout(SEND_S):
                        await loop.sock_sendall(connection, frame)
                    self.frames[port.protocol] += 1
                async with asyncio.timeout(ANSWER_S[port.protocol]):
                    while len(answer) < MOST_BYTES and (part := await loop.sock_recv(connection, 4096)):
                        answer += part
        if answer:
            self.answered[port.protocol] += 1
        if (finding := judge(port, conversation, bytes(answer), self.key)) is not None:
            self.findings.append(f"{port}: {finding}; sent {conversation!r:.400}")


def judge(port: ListeningPort, conversation: Conversation, answer: bytes, key: str) -> str | None:
    """Why a server should not have given this answer; None if it may."""
    if port.protocol is Protocol.SILENT and answer:
        return f"answered {answer[:60]!r}"
    if port.protocol is Protocol.ZMTP and b"\x05READY" in answer:
        return "admitted a peer without the cluster's key"
    if port.protocol is Protocol.HTTP and port.is_of_the_service:
        if (failed := _FAILED.search(answer)) is not None:
            return f"answered {failed[1].decode()}"
        said = b"".join(conversation)
        if key.encode() not in said and b'"choices"' in answer:
            return "completed a prompt without a key"
    return None
