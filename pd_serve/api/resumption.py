"""Streams that a client resumes: `id:` lines with marks, and what the client has already is left out.

Only for requests with the header `Last-Event-ID`; other streams stay byte-identical to vLLM's. The header is
0 at the first request, and the last `id` when the client asks again. An id is the number of characters
delivered so far (of tokens where the stream has tokens only) and their checksum. What the client has is left
out only if the stream begins with exactly that; otherwise it comes from its beginning. Events without an id
come again. Streams of several choices have none.
"""

import json
import re
import zlib
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "Last-Event-ID"

#: Fields of a chat delta that count, in the order of their text.
DELTA_FIELDS = ("reasoning", "content")

_ID = re.compile(r"([0-9]{1,15})-([0-9a-f]{8})")


@dataclass(slots=True)
class Origin:
    """Where the engine requests of one HTTP request come from.

    Attributes:
        requests: Number of engine requests that it brings.
        resumed: Whether the last one of them was begun for an earlier HTTP request.
    """

    requests: int = 0
    resumed: bool = False


_origin: ContextVar[Origin | None] = ContextVar("pd_serve_origin", default=None)
"""Of the HTTP request of this task. Inherited by the tasks that vLLM's handlers start."""


def expect_requests(number: int) -> None:
    """The HTTP request of this task brings `number` (more) engine requests; call it before any event."""
    if (origin := _origin.get()) is not None:
        origin.requests += number


def note_resumed(resumed: bool) -> None:
    """An engine request of the HTTP request of this task has been submitted."""
    if (origin := _origin.get()) is not None:
        origin.resumed = resumed


class Mark(NamedTuple):
    """A place in a stream.

    Attributes:
        position: Number of characters or tokens before it.
        checksum: CRC-32 of them, and of the fields that they are in.
        field: The last field.
    """

    position: int = 0
    checksum: int = 0
    field: str = ""

    @classmethod
    def of(cls, event_id: str) -> "Mark":
        """The place of an `id`; the beginning for everything else."""
        match = _ID.fullmatch(event_id)
        return cls(int(match[1]), int(match[2], 16)) if match is not None else cls()

    def after(self, field: str, value: str | list[int]) -> "Mark":
        """The place after this text, or these tokens, of a field."""
        if not value:
            return self
        text = value if isinstance(value, str) else "".join(f"{token}," for token in value)
        name = "" if field == self.field else f"\0{field}\0"
        encoded = (name + text).encode(errors="surrogatepass")
        return Mark(self.position + len(value), zlib.crc32(encoded, self.checksum), field)

    def is_at(self, other: "Mark") -> bool:
        return self[:2] == other[:2]

    def __str__(self) -> str:
        return f"{self.position}-{self.checksum:08x}"


class ResumptionMiddleware:
    """Numbers the events of streams whose requests have `Last-Event-ID`, and leaves out what came before."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if scope["type"] != "http" or (last := Headers(scope=scope).get(HEADER)) is None:
            return await self.app(scope, receive, send)
        origin = Origin()
        events = NumberedEvents(origin, Mark.of(last))
        is_stream = False

        async def send_numbered(message: Message) -> None:
            nonlocal is_stream
            if message["type"] == "http.response.start":
                kind = Headers(raw=message["headers"]).get("content-type", "")
                is_stream = kind.startswith("text/event-stream")
            elif message["type"] == "http.response.body" and is_stream:
                more = message.get("more_body", False)
                body = events.feed(message.get("body", b""))
                if not more:
                    body += events.rest()
                message = {**message, "body": body}
                if more and not body:
                    return
            await send(message)

        token = _origin.set(origin)
        try:
            await self.app(scope, receive, send_numbered)
        finally:
            _origin.reset(token)


class NumberedEvents:
    """The events of one stream.

    Args:
        last: The client has an earlier stream up to this mark.
    """

    def __init__(self, origin: Origin, last: Mark) -> None:
        self._origin = origin
        self._last = last
        self._mark = Mark()
        self._held: list[tuple[bytes, bool]] = []  # events before the last mark, and whether they count
        self._is_decided = False
        self._buffer = b""

    def feed(self, data: bytes) -> bytes:
        """Takes a part of the stream. Returns what is to be sent."""
        *events, self._buffer = (self._buffer + data).split(b"\n\n")
        return b"".join(self._numbered(event) for event in events)

    def rest(self) -> bytes:
        """What is left at the end of the stream."""
        rest, self._buffer = self._buffer, b""
        return self._begin_anew() + rest

    @property
    def _holds(self) -> bool:
        """Whether it is open if the stream begins with what the client has. Events wait until then."""
        return self._origin.resumed and not self._is_decided and self._mark.position < self._last.position

    def _numbered(self, event: bytes) -> bytes:
        whole = event + b"\n\n"
        if not event.startswith(b"data: ") or self._origin.requests != 1:
            return whole
        try:
            chunk = json.loads(event[len(b"data: ") :])
        except ValueError:
            chunk = None  # [DONE]
        if not isinstance(chunk, dict):
            return self._begin_anew() + whole
        if chunk.get("error"):
            if self._holds:
                self._held.clear()  # the client keeps what it has, and its last id
                self._is_decided = True
            return whole
        choices = chunk.get("choices")
        if choices and (len(choices) > 1 or not _is_counted(choices[0])):
            return self._send_or_hold(whole, counts=False)
        if not choices:
            return self._send_or_hold(self._with_id(whole), counts=True)
        return self._take(chunk, choices[0], whole)

    def _take(self, chunk: dict[str, Any], choice: dict[str, Any], whole: bytes) -> bytes:
        """Takes an event with a text or tokens that count."""
        held, last = self._holds, self._last
        is_same, has_left = False, False
        for part, field in _parts(choice):
            value = part[field]
            skipped = min(max(last.position - self._mark.position, 0), len(value)) if held else 0
            is_same = is_same or (skipped > 0 and self._mark.after(field, value[:skipped]).is_at(last))
            self._mark = self._mark.after(field, value)
            part[field] = value[skipped:]
            has_left = has_left or bool(part[field])
        whole = self._with_id(whole)
        if not held:
            return whole
        is_last = choice.get("finish_reason") is not None
        if self._mark.position < last.position and not is_last:
            return self._send_or_hold(whole, counts=True)
        if not is_same:
            return self._begin_anew() + whole
        self._is_decided = True
        body = b"".join(event for event, counts in self._held if not counts)
        self._held.clear()
        if not has_left and not is_last:
            return body
        text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
        return body + self._with_id(b"data: " + text.encode(errors="surrogatepass") + b"\n\n")

    def _send_or_hold(self, event: bytes, *, counts: bool) -> bytes:
        if not self._holds:
            return event
        self._held.append((event, counts))
        return b""

    def _begin_anew(self) -> bytes:
        """The stream is another one than the client has, or it is known to be the same."""
        self._is_decided = True
        body = b"".join(event for event, _ in self._held)
        self._held.clear()
        return body

    def _with_id(self, event: bytes) -> bytes:
        return f"id: {self._mark}\n".encode() + event


def _parts(choice: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Where the text or the tokens of a choice are."""
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return [(delta, field) for field in DELTA_FIELDS if isinstance(delta.get(field), str)]
    field = "text" if isinstance(choice.get("text"), str) else "token_ids"
    return [(choice, field)] if choice.get(field) is not None else []


def _is_counted(choice: dict[str, Any]) -> bool:
    """Whether a position says all about a choice: not with tool calls, or tokens beside a text."""
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return not delta.get("tool_calls") and not choice.get("token_ids")
    return not (isinstance(choice.get("text"), str) and choice.get("token_ids"))
