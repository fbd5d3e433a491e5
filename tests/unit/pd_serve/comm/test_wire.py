"""Real sockets on loopback: arrival, order and sender of messages."""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import msgspec
import pytest
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from migration.messages import RequestId
from pd_serve.comm.messages import AbortRequests, SetRole, ToInstance
from pd_serve.comm.wire import GATHER_S, MAX_BURST, CurveKeys, is_local
from tests.unit.pd_serve.comm.wire_world import KEYS, Inbox, MakeWire

# ---- delivery


async def test_a_message_arrives_with_its_sender_and_its_payload_frames(make_wire: MakeWire) -> None:
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()
    a.connect("b", b.listen(ToInstance, inbox.on_message))
    message = AbortRequests([RequestId("r")], 7)

    assert a.send("b", message, [b"", b"\x00\xff" * 40_000])
    await inbox.wait_for(1)

    assert inbox.messages == [("a", message, [b"", b"\x00\xff" * 40_000])]


async def test_messages_of_one_sender_arrive_in_order(make_wire: MakeWire) -> None:
    """Two senders at once: their messages mix, but neither overtakes itself."""
    receiver, inbox = make_wire("r"), Inbox()
    address = receiver.listen(ToInstance, inbox.on_message)
    senders = [make_wire("a"), make_wire("b")]
    for sender in senders:
        sender.connect("r", address)

    for number in range(300):
        for sender in senders:
            assert sender.send("r", SetRole(str(number)))
    await inbox.wait_for(600)

    for name in ("a", "b"):
        assert [text for sender, text in inbox.received if sender == name] == [str(n) for n in range(300)]


async def test_two_wires_exchange_messages_in_both_directions(make_wire: MakeWire) -> None:
    a, b, to_a, to_b = make_wire("a"), make_wire("b"), Inbox(), Inbox()
    a.connect("b", b.listen(ToInstance, to_b.on_message))
    b.connect("a", a.listen(ToInstance, to_a.on_message))
    a.send("b", SetRole("1"))
    b.send("a", SetRole("2"))

    await to_a.wait_for(1)
    await to_b.wait_for(1)

    assert (to_a.received, to_b.received) == ([("b", "2")], [("a", "1")])


async def test_messages_sent_before_the_peer_listens_arrive(make_wire: MakeWire) -> None:
    """Processes get the membership in any order."""
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()
    address = b.listen(ToInstance, inbox.on_message)
    a.connect("b", address)
    for number in range(10):
        assert a.send("b", SetRole(str(number)))  # without a turn of the loop in between

    await inbox.wait_for(10)

    assert [text for _, text in inbox.received] == [str(number) for number in range(10)]


async def test_a_publisher_on_another_thread_sends_to_the_same_inbox(make_wire: MakeWire) -> None:
    """The step thread's tokens."""
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()
    address = b.listen(ToInstance, inbox.on_message)

    def publish() -> None:
        socket = a.publisher(address)
        socket.send_multipart([b"thread", msgspec.msgpack.encode(SetRole("1"))])
        socket.close(linger=10_000)

    await asyncio.to_thread(publish)
    await inbox.wait_for(1)

    assert inbox.received == [("thread", "1")]


# ---- peers


async def test_a_connection_is_opened_for_the_first_message(make_wire: MakeWire) -> None:
    """Every instance knows every other one, and few pairs ever exchange a message."""
    opened = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.set()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    wire = make_wire("a")
    wire.connect("b", f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await asyncio.sleep(0.1)
    assert not opened.is_set()

    wire.send("b", SetRole("1"))

    await asyncio.wait_for(opened.wait(), 10)
    wire.disconnect("b")
    server.close()


async def test_other_tasks_run_while_messages_keep_coming(make_wire: MakeWire) -> None:
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()
    turn, turns = 0, Counter[int]()

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    def on_message(sender: str, message: object, payload: Sequence[bytes]) -> None:
        turns[turn] += 1
        inbox.on_message(sender, message, payload)

    a.connect("b", b.listen(ToInstance, on_message))
    sent = 4 * MAX_BURST
    for number in range(sent):
        a.send("b", SetRole(str(number)))
    counting = asyncio.create_task(count_turns())
    await inbox.wait_for(sent)
    counting.cancel()

    assert [role for _, role in inbox.received] == [str(number) for number in range(sent)]
    assert max(turns.values()) <= 2 * (MAX_BURST + 1)


async def test_messages_that_are_not_urgent_are_received_together(make_wire: MakeWire) -> None:
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()
    a.connect("b", b.listen(ToInstance, inbox.on_message, gathers=True))
    for number in range(50):
        a.send("b", SetRole(str(number)))
        await asyncio.sleep(GATHER_S / 10)
    await inbox.wait_for(50)

    assert [role for _, role in inbox.received] == [str(number) for number in range(50)]


async def test_a_message_to_an_unknown_peer_is_not_sent(make_wire: MakeWire) -> None:
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()
    assert not a.send("b", SetRole("1"))

    a.connect("b", b.listen(ToInstance, inbox.on_message))
    assert a.send("b", SetRole("2"))
    a.disconnect("b")
    a.disconnect("b")

    assert not a.send("b", SetRole("3"))


async def test_a_new_address_replaces_the_old_one(make_wire: MakeWire) -> None:
    """An instance was started anew under its name: the old process hears nothing more."""
    a, before, after = make_wire("a"), Inbox(), Inbox()
    old, new = make_wire("old"), make_wire("new")
    a.connect("b", old.listen(ToInstance, before.on_message))
    a.send("b", SetRole("1"))
    await before.wait_for(1)

    a.connect("b", new.listen(ToInstance, after.on_message))
    a.send("b", SetRole("2"))
    await after.wait_for(1)

    assert (before.received, after.received) == ([("a", "1")], [("a", "2")])


async def test_the_same_address_again_keeps_messages_in_transit(make_wire: MakeWire) -> None:
    """Every heartbeat names all addresses."""
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()
    address = b.listen(ToInstance, inbox.on_message)
    for number in range(20):
        a.connect("b", address)
        a.send("b", SetRole(str(number)))

    await inbox.wait_for(20)

    assert [text for _, text in inbox.received] == [str(number) for number in range(20)]


async def test_a_peer_that_does_not_read_does_not_block_the_sender(
    make_wire: MakeWire, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The address has no listener: a bounded number of messages waits, more are dropped."""
    monkeypatch.setattr("pd_serve.comm.wire.HIGH_WATER_MARK", 5)
    a = make_wire("a")
    a.connect("b", "tcp://127.0.0.1:1")

    sent = [a.send("b", SetRole(str(number))) for number in range(20)]

    assert not all(sent)
    assert "b does not read: a SetRole is dropped" in caplog.text


async def test_a_connection_whose_other_end_is_gone_without_a_word_is_opened_again(
    make_wire: MakeWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router between has forgotten the connection: what is sent disappears, and no error comes back."""
    monkeypatch.setattr("pd_serve.comm.wire.HEARTBEAT_INTERVAL_MS", 50)
    monkeypatch.setattr("pd_serve.comm.wire.HEARTBEAT_TIMEOUT_MS", 200)
    sender, receiver, inbox = make_wire("a"), make_wire("b"), Inbox()
    host, _, port = receiver.listen(ToInstance, inbox.on_message).removeprefix("tcp://").partition(":")
    forgotten = asyncio.Event()
    writers: list[asyncio.StreamWriter] = []
    tasks: list[asyncio.Task[None] | None] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        remembers = not forgotten.is_set()
        while data := await reader.read(1 << 16):
            if not (remembers and forgotten.is_set()):
                writer.write(data)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await asyncio.open_connection(host, int(port))
        writers.extend((writer, upstream[1]))
        tasks.append(asyncio.current_task())
        with suppress(OSError):
            await asyncio.gather(forward(reader, upstream[1]), forward(upstream[0], writer))

    router = await asyncio.start_server(accept, "127.0.0.1", 0)
    sender.connect("b", f"tcp://127.0.0.1:{router.sockets[0].getsockname()[1]}")
    sender.send("b", SetRole("before"))
    await inbox.wait_for(1)
    forgotten.set()
    sender.send("b", SetRole("lost"))

    async with asyncio.timeout(30):
        while inbox.received[-1] != ("a", "after"):
            sender.send("b", SetRole("after"))
            await asyncio.sleep(0.05)

    assert ("a", "lost") not in inbox.received
    router.close()
    sender.disconnect("b")
    for writer in writers:
        writer.transport.abort()
    await asyncio.gather(*filter(None, tasks), return_exceptions=True)


# ---- what makes no sense


@pytest.mark.parametrize(
    "frames",
    [
        [b"x", b"\xc1"],
        [b"x", b""],
        [b"x", msgspec.msgpack.encode({"type": "NoSuchMessage"})],
        [b"x", msgspec.msgpack.encode({"type": "SetRole"})],
        [b"x", msgspec.msgpack.encode({"type": "SetRole", "role": 5})],
        [b"\xff\xfe", msgspec.msgpack.encode(SetRole("1"))],
        [b"x"],
        [b""],
    ],
    ids=[
        "no msgpack",
        "empty",
        "unknown tag",
        "field missing",
        "wrong type",
        "no text",
        "one frame",
        "nothing",
    ],
)
async def test_garbage_is_counted_and_the_next_message_arrives(
    make_wire: MakeWire, frames: list[bytes]
) -> None:
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()

    with a.publisher(b.listen(ToInstance, inbox.on_message)) as socket:
        socket.send_multipart(frames)
        socket.send_multipart([b"a", msgspec.msgpack.encode(SetRole("1"))])
        await inbox.wait_for(1)

    assert inbox.received == [("a", "1")]
    assert len(b.failures) == 1


async def test_a_handler_that_fails_is_counted_and_the_next_message_arrives(
    make_wire: MakeWire, caplog: pytest.LogCaptureFixture
) -> None:
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()

    def fail_once(sender: str, message: object, payload: Sequence[bytes]) -> None:
        if not caplog.records:
            raise RuntimeError("a bug")
        inbox.on_message(sender, message, payload)

    a.connect("b", b.listen(ToInstance, fail_once))
    with caplog.at_level(logging.ERROR):
        a.send("b", SetRole("1"))
        a.send("b", SetRole("2"))
        await inbox.wait_for(1)

    assert inbox.received == [("a", "2")]
    assert "a bug" in caplog.text
    assert b.failures.problems() == ["b: handling SetRole from a failed: RuntimeError: a bug (1 times)"]


# ---- authentication


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("", False),
    ],
)
def test_only_loopback_is_local(host: str, local: bool) -> None:
    assert is_local(host) is local


def test_the_same_secret_makes_the_same_keys() -> None:
    """However it came to a process."""
    keys = CurveKeys.derive(b"s" * 32)

    assert keys == CurveKeys.derive(b"s" * 32)
    assert keys.secret != CurveKeys.derive(b"t" * 32).secret
    assert keys.public == zmq.curve_public(keys.secret)


def test_the_repr_of_keys_hides_them() -> None:
    shown = repr(KEYS)

    assert KEYS.secret.decode() not in shown
    assert KEYS.public.decode() not in shown


async def test_wires_with_derived_keys_exchange_messages(make_wire: MakeWire) -> None:
    inbox = Inbox()
    a, b = (make_wire(name, keys=CurveKeys.derive(b"s" * 32)) for name in "ab")
    a.connect("b", b.listen(ToInstance, inbox.on_message))

    a.send("b", SetRole("1"))
    await inbox.wait_for(1)

    assert inbox.received == [("a", "1")]


async def test_a_client_without_zeromq_gets_only_the_greeting(make_wire: MakeWire) -> None:
    """ZeroMQ sends its greeting to every client."""
    b, inbox = make_wire("b"), Inbox()
    host, port = b.listen(ToInstance, inbox.on_message).removeprefix("tcp://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))

    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"x" * 100)
    async with asyncio.timeout(30):
        with suppress(ConnectionResetError):
            assert len(await reader.read()) <= 64
    writer.close()

    assert inbox.messages == []


async def test_a_frame_that_is_too_long_is_discarded(
    make_wire: MakeWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the connection; messages on the next connection arrive."""
    monkeypatch.setattr("pd_serve.comm.wire.MAX_FRAME_BYTES", 10_000)
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()
    a.connect("b", b.listen(ToInstance, inbox.on_message))

    a.send("b", SetRole("1"), [bytes(20_000)])
    async with asyncio.timeout(30):
        while not inbox.messages:
            a.send("b", SetRole("2"))
            await asyncio.sleep(0.01)

    assert ("a", "1") not in inbox.received


async def test_a_listener_without_keys_does_not_read_the_cluster_s_messages(make_wire: MakeWire) -> None:
    """Another process listens at the address of an instance that has ended: it needs the cluster's key."""
    a = make_wire("a")
    with zmq.asyncio.Context() as context, context.socket(zmq.PULL) as impostor:
        failures = zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
        with impostor.get_monitor_socket(failures) as handshakes:
            port = impostor.bind_to_random_port("tcp://127.0.0.1")
            a.connect("impostor", f"tcp://127.0.0.1:{port}")
            a.send("impostor", SetRole("1"))
            async with asyncio.timeout(30):
                await recv_monitor_message(handshakes)
            assert await impostor.poll(100) == 0


async def test_a_public_key_that_is_not_the_cluster_s_is_rejected(make_wire: MakeWire) -> None:
    wire = make_wire("a")

    assert wire.callback("", KEYS.public)
    assert not wire.callback("", CurveKeys.generate().public)
