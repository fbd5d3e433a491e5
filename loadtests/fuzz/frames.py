"""Frames to send: valid ones of each protocol, and their mutations."""

import json
import random
import struct
from collections.abc import Sequence

from loadtests.fuzz.ports import Protocol

#: Frames that one connection sends, one after another.
Conversation = list[bytes]

#: Longest frame after mutations.
MOST_BYTES = 1 << 17

# ---- ZeroMQ: ZMTP 3.1, https://rfc.zeromq.org/spec/37, with the mechanism CURVE, https://rfc.zeromq.org/spec/26


def greeting(
    mechanism: bytes = b"CURVE", version: tuple[int, int] = (3, 1), as_server: bool = False
) -> bytes:
    """A greeting of 64 bytes."""
    signature = b"\xff" + struct.pack(">Q", 1) + b"\x7f"
    return signature + bytes(version) + mechanism.ljust(20, b"\0")[:20] + bytes([as_server]) + bytes(31)


def command(name: bytes, body: bytes) -> bytes:
    """A command frame."""
    content = bytes([len(name)]) + name + body
    if len(content) < 256:
        return bytes([4, len(content)]) + content
    return b"\x06" + struct.pack(">Q", len(content)) + content


def message(body: bytes, more: bool = False) -> bytes:
    """A message frame."""
    if len(body) < 256:
        return bytes([int(more), len(body)]) + body
    return bytes([2 | int(more)]) + struct.pack(">Q", len(body)) + body


def zmtp(dice: random.Random) -> list[Conversation]:
    """Conversations of a peer that does not have the cluster's key."""
    hello = b"\x01\x00" + bytes(72) + dice.randbytes(32 + 8 + 80)
    initiate = dice.randbytes(96 + 8 + 144)
    ready = command(b"READY", b"\x0bSocket-Type\x00\x00\x00\x04PUSH")
    membership = b"\x95\xa7manager\xcf" + bytes(8)
    return [
        [greeting(), command(b"HELLO", hello)],
        [greeting(), command(b"HELLO", hello), command(b"INITIATE", initiate)],
        [greeting(), command(b"HELLO", hello), command(b"MESSAGE", dice.randbytes(60))],
        [greeting(b"NULL"), ready, message(b"manager", True), message(membership)],
        [greeting(b"PLAIN"), command(b"HELLO", b"\x05admin\x06secret"), ready],
        [greeting(b"CURVE", (3, 0), as_server=True), command(b"WELCOME", dice.randbytes(144))],
        [greeting(b"", (1, 0)), message(b""), message(membership)],
        [b"\x01\x00", message(membership)],  # ZMTP 1.0
        [greeting(), command(b"ERROR", b"\x03bad"), command(b"PING", b"\x00\x10abc")],
        [greeting(), b"\x06" + struct.pack(">Q", 2**63 - 1) + b"\x05HELLO"],
        [greeting(b"NULL"), ready, b"\x02" + struct.pack(">Q", 2**40) + b"x" * 64],
    ]


# ---- HTTP


def http(key: str, model: str) -> list[Conversation]:
    """Requests that change nothing, with and without a key."""
    chat = {"model": model, "messages": [{"role": "user", "content": "a b c"}], "max_tokens": 2}
    completion = {"model": model, "prompt": [5, 6, 7], "max_tokens": 2, "stream": True, "temperature": 0.5}
    bodies = [("/v1/chat/completions", chat), ("/v1/completions", completion)]
    bodies += [
        ("/tokenize", {"model": model, "prompt": "a b"}),
        ("/detokenize", {"model": model, "tokens": [7]}),
    ]
    conversations = []
    for path, body in bodies:
        text = json.dumps(body).encode()
        conversations.append([request("POST", path, text, key)])
        conversations.append([request("POST", path, text, None)])
        half = len(text) // 2
        chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in (text[:half], text[half:], b"")]
        conversations.append([chunked_head(path, key), *chunks])
    for path in (
        "/health",
        "/v1/models",
        "/metrics",
        "/cluster",
        "/cluster/requests/x",
        "/openapi.json",
        "/x",
    ):
        conversations.append([request("GET", path, b"", key)])
    conversations.append([request("GET", "/health", b"", key) * 3])
    conversations.append([request("OPTIONS", "*", b"", key)])
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: eA==\r\n"
    conversations.append([b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n"])
    return conversations


def request(method: str, path: str, body: bytes, key: str | None) -> bytes:
    """A request of HTTP/1.1."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    lines += [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked_head(path: str, key: str) -> bytes:
    """The head of a request whose body comes in chunks."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Authorization: Bearer {key}", "Transfer-Encoding: chunked", "", ""]
    return "\r\n".join(lines).encode()


# ---- HTTP/2 with gRPC, https://www.rfc-editor.org/rfc/rfc9113


def grpc() -> list[Conversation]:
    """Conversations of a peer without a token."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return (
            struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload
        )

    settings = frame(4, 0, 0, struct.pack(">HI", 3, 100))
    path = b"/ray.rpc.NodeManagerService/GetNodeStats"
    headers = b"\x83\x86\x44" + bytes([len(path)]) + path + b"\x41\x01x\x5f\x10application/grpc"
    call = frame(1, 4, 1, headers) + frame(0, 1, 1, bytes(5))
    return [
        [preface + settings, call],
        [preface, settings, frame(4, 1, 0, b""), call],
        [preface + settings, frame(6, 0, 0, bytes(8)), frame(8, 0, 0, struct.pack(">I", 2**31 - 1))],
        [preface + settings, frame(3, 0, 1, bytes(4)), frame(7, 0, 0, bytes(8)), call],
    ]


# ---- ports that say nothing


def silent(dice: random.Random) -> list[Conversation]:
    """Frames with plausible headers for servers whose protocol begins with the client."""
    return [
        [dice.randbytes(64)],
        [bytes(200)],
        [b"\xff" * 200],
        [struct.pack("<Q", 16) + dice.randbytes(16)],
        [struct.pack("<II", 0xCAFE, 1) + dice.randbytes(56), dice.randbytes(120)],
        [struct.pack(">I", 2**31 - 1) + dice.randbytes(32)],
        [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + dice.randbytes(64)],
        [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"],
        [greeting(), command(b"HELLO", dice.randbytes(194))],
    ]


class FrameMaker:
    """Draws conversations for each protocol.

    Args:
        key: API key of HTTP requests.
        model: The model that they name.
        recorded: Conversations of peers that have the cluster's key, up to where they are accepted.
    """

    def __init__(self, seed: int, key: str, model: str, recorded: Sequence[Conversation] = ()) -> None:
        self._dice = random.Random(f"frames {seed}")
        self._seeds: dict[Protocol, list[Conversation]] = {
            Protocol.ZMTP: zmtp(self._dice) + [list(one) for one in recorded] * 3,
            Protocol.HTTP: http(key, model),
            Protocol.GRPC: grpc(),
            Protocol.SILENT: silent(self._dice),
        }

    def conversation(self, protocol: Protocol) -> Conversation:
        """A mutated conversation; at least one of its frames differs from a valid one."""
        frames = list(self._dice.choice(self._seeds[protocol]))
        if self._dice.random() < 0.1:
            frames.insert(self._dice.randrange(len(frames) + 1), self._dice.choice(frames))
        first = self._dice.randrange(len(frames))
        return [
            self.mutated(frame, protocol) if number == first or self._dice.random() < 0.2 else frame
            for number, frame in enumerate(frames)
        ]

    def mutated(self, frame: bytes, protocol: Protocol) -> bytes:
        """A frame with one to four mutations."""
        dice, found = self._dice, bytearray(frame)
        while bytes(found) == frame:
            for _ in range(dice.choice((1, 1, 1, 2, 4))):
                dice.choice(_MUTATIONS)(dice, found)
            if dice.random() < 0.1:  # the beginning of one frame and the end of another
                other = dice.choice(dice.choice(self._seeds[protocol]))
                found[len(found) // 2 :] = other[dice.randrange(len(other) + 1) :]
        return bytes(found[:MOST_BYTES])


def _flip(dice: random.Random, frame: bytearray) -> None:
    if frame:
        frame[dice.randrange(len(frame))] ^= 1 << dice.randrange(8)


def _overwrite(dice: random.Random, frame: bytearray) -> None:
    if frame:
        at = dice.randrange(len(frame))
        frame[at : at + dice.choice((1, 2, 4, 8))] = dice.choice(
            (
                b"\0",
                b"\xff",
                b"\x7f",
                b"\x80",
                b"\xff\xff\xff\xff",
                bytes(8),
                b"\x7f" + b"\xff" * 7,
                b"\r\n",
                b'"',
            )
        )


def _insert(dice: random.Random, frame: bytearray) -> None:
    at = dice.randrange(len(frame) + 1)
    frame[at:at] = dice.randbytes(dice.choice((1, 2, 8, 64, 1024)))


def _delete(dice: random.Random, frame: bytearray) -> None:
    at = dice.randrange(len(frame) + 1)
    del frame[at : at + dice.choice((1, 2, 8, 64))]


def _truncate(dice: random.Random, frame: bytearray) -> None:
    del frame[dice.randrange(len(frame) + 1) :]


def _repeat(dice: random.Random, frame: bytearray) -> None:
    at = dice.randrange(len(frame) + 1)
    part = bytes(frame[at : at + dice.choice((1, 4, 16, 64))])
    frame[at:at] = part * dice.choice((1, 2, 16, 256))


def _number(dice: random.Random, frame: bytearray) -> None:
    """Replaces a decimal number, such as a length."""
    digits = [at for at, byte in enumerate(frame) if 48 <= byte <= 57]
    if digits:
        numbers = (b"-1", b"0", b"4294967296", b"99999999999999999999", b"1e309", b"0x10", b"")
        frame[(at := dice.choice(digits)) : at + 1] = dice.choice(numbers)


_MUTATIONS = (_flip, _flip, _overwrite, _overwrite, _insert, _delete, _truncate, _repeat, _number)
