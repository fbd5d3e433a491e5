"""Event ids of streams, and streams that go on after them."""

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from pd_serve.api.resumption import ResumptionMiddleware, expect_requests, note_resumed

DONE = b"data: [DONE]\n\n"


def event(**choice: Any) -> bytes:
    return f"data: {json.dumps({'id': 'r', 'choices': [{'index': 0, **choice}]})}\n\n".encode()


def texts(*parts: str) -> list[bytes]:
    return [event(text=part) for part in parts]


def stream(
    bodies: list[bytes],
    last: str | None = None,
    *,
    resumed: bool = False,
    requests: int = 1,
    kind: str = "text/event-stream; charset=utf-8",
) -> bytes:
    """The body that a client gets."""
    sent: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        expect_requests(requests)
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]}
        )
        note_resumed(resumed)
        for body in bodies:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> Message:
        return {"type": "http.request"}

    headers = [] if last is None else [(b"last-event-id", last.encode())]
    scope: Scope = {"type": "http", "headers": headers}
    asyncio.run(ResumptionMiddleware(app)(scope, receive, send))
    return b"".join(sent)


def parsed(body: bytes) -> list[tuple[str, Any]]:
    """Id and first choice of every event; "" without an id."""
    found = []
    for part in body.decode().removesuffix("\n\n").split("\n\n"):
        *ids, data = part.split("\n")
        content = data.removeprefix("data: ")
        event_id = ids[0].removeprefix("id: ") if ids else ""
        found.append((event_id, None if content == "[DONE]" else json.loads(content)["choices"][0]))
    return found


def positions(body: bytes) -> list[int | None]:
    return [int(event_id.partition("-")[0]) if event_id else None for event_id, _ in parsed(body)]


def ids(*bodies: bytes) -> list[str]:
    """The ids that the client of a first request gets."""
    return [event_id for event_id, _ in parsed(stream(list(bodies), "0"))]


def text_id(text: str) -> str:
    """The id after a text."""
    return ids(event(text=text))[0]


def test_without_the_header_every_byte_is_as_it_was() -> None:
    bodies = [*texts("ab", "c"), DONE]

    assert stream(bodies, resumed=True) == b"".join(bodies)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_every_event_has_the_number_of_characters_so_far(size: int) -> None:
    whole = b"".join([*texts("ab", "", "\u00e9\U0001f600"), DONE])
    bodies = [whole[begin : begin + size] for begin in range(0, len(whole), size)]

    body = stream(bodies, "0")

    assert positions(body) == [2, 2, 4, None]
    assert b"".join(part for part in body.splitlines(keepends=True) if not part.startswith(b"id:")) == whole


@pytest.mark.parametrize("last", range(7))
def test_a_resumed_stream_goes_on_after_the_last_id(last: int) -> None:
    bodies = [*texts("abc", "de"), event(text="f", finish_reason="stop"), DONE]

    body = stream(bodies, text_id("abcdef"[:last]), resumed=True)

    events = parsed(body)
    assert "".join(choice["text"] for _, choice in events if choice) == "abcdef"[last:]
    assert events[-2][1]["finish_reason"] == "stop"
    assert events[-1] == ("", None)
    assert all(number is None or number > last for number in positions(body)[:-2])
    assert events[-2][0] == text_id("abcdef")


def test_ids_do_not_depend_on_how_a_text_is_divided() -> None:
    assert ids(*texts("abc", "", "de"))[-1] == ids(*texts("a", "bcd", "e"))[-1]
    assert ids(*texts("abcde")) != ids(*texts("abcdf"))


@pytest.mark.parametrize("divided", [["abxd", "ef"], ["a", "b", "x", "d", "e", "f"], ["abxdef"]])
def test_another_text_comes_from_its_beginning(divided: list[str]) -> None:
    """The client's stream ended in "abcd": what it would be told after that belongs to another answer."""
    bodies = [*texts(*divided[:-1]), event(text=divided[-1], finish_reason="stop"), DONE]

    assert stream(bodies, text_id("abcd"), resumed=True) == stream(bodies, "0")


def test_a_text_that_is_shorter_than_what_the_client_has_comes_from_its_beginning() -> None:
    for bodies in (
        [*texts("ab"), event(text="c", finish_reason="stop"), DONE],
        [*texts("ab", "c"), DONE],
        texts("ab", "c"),
    ):
        assert stream(bodies, text_id("abcd"), resumed=True) == stream(bodies, "0")


def test_an_error_before_the_last_id_is_all_that_the_client_gets() -> None:
    """It keeps what it has, and its id: it may ask again."""
    error = b'data: {"error":{"message":"m"}}\n\n'

    assert stream([*texts("ab"), error, DONE], text_id("abcd"), resumed=True) == error + DONE


def test_a_stream_that_is_not_resumed_begins_at_0_again() -> None:
    assert parsed(stream(texts("abc"), text_id("ab"))) == [(text_id("abc"), {"index": 0, "text": "abc"})]


def test_reasoning_counts_before_the_content_of_a_chat() -> None:
    bodies = [
        event(delta={"role": "assistant", "content": ""}),
        event(delta={"reasoning": "hmm"}),
        event(delta={"reasoning": "!", "content": "yes"}),
        event(delta={}, finish_reason="stop"),
    ]

    assert positions(stream(bodies, "0")) == [0, 3, 7, 7]
    last = ids(event(delta={"reasoning": "hmm!"}), event(delta={"content": "y"}))[-1]
    events = parsed(stream(bodies, last, resumed=True))
    assert [choice["delta"] for _, choice in events] == [{"reasoning": "", "content": "es"}, {}]
    other = ids(event(delta={"content": "hmm!y"}))[-1]
    assert stream(bodies, other, resumed=True) == stream(bodies, "0")


def test_tokens_count_where_a_stream_has_nothing_else() -> None:
    bodies = [event(token_ids=[1, 2]), event(token_ids=[3], finish_reason="length")]

    assert positions(stream(bodies, "0")) == [2, 3]
    (last,) = ids(event(token_ids=[1]))
    assert [choice["token_ids"] for _, choice in parsed(stream(bodies, last, resumed=True))] == [[2], [3]]
    (other,) = ids(event(token_ids=[12]))
    assert stream(bodies, other, resumed=True) == stream(bodies, "0")


def test_what_no_position_says_all_about_has_no_id_and_comes_again() -> None:
    called = [{"index": 0, "function": {"arguments": "{}"}}]
    bodies = [
        event(delta={"content": "a"}),
        event(delta={"tool_calls": called}),
        event(delta={"content": "b"}),
        event(text="a", token_ids=[1]),
    ]
    last = ids(*bodies[:3])[2]

    events = parsed(stream(bodies, last, resumed=True))

    assert [event_id for event_id, _ in events] == ["", ""]
    assert events[0][1]["delta"]["tool_calls"] == called


def test_several_choices_have_no_ids_and_come_from_the_beginning() -> None:
    bodies = [*texts("abc"), event(index=1, text="x")]

    assert stream(bodies, text_id("ab"), resumed=True, requests=2) == b"".join(bodies)


@pytest.mark.parametrize(
    "last", ["", "0", "2", "-1", "1e3", "2-", "2-1234", "9" * 40 + "-00000000", "2-0000000g"]
)
def test_a_header_that_is_no_id_is_that_of_a_first_request(last: str) -> None:
    assert stream(texts("abc"), last, resumed=True) == stream(texts("abc"), "0")


def test_other_answers_and_broken_events_are_left_alone() -> None:
    bodies = [b'{"choices":[{"text":"abc"}]}\n\n']
    assert stream(bodies, text_id("ab"), resumed=True, kind="application/json") == bodies[0]
    bodies = [b"data: {broken\n\n", b"event: ping\ndata: {}\n\n", b"data: {}\n\n", b"half an ev"]
    expected = b"data: {broken\n\nevent: ping\ndata: {}\n\nid: 0-00000000\ndata: {}\n\nhalf an ev"
    assert stream(bodies, "0") == expected
