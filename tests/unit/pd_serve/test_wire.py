"""Real sockets on loopback: what arrives, in which order, and from whom."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from migration.messages import RequestId
from pd_serve.messages import AbortRequests, PeerLost, ToInstance
from pd_serve.wire import CurveKeys, Wire, is_local

decode = msgspec.msgpack.Decoder(ToInstance).decode

MakeWire = Callable[..., Wire]


class Inbox:
    """Takes the messages of a wire, as a llumlet does, and what it cannot make sense of it lets out."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, object, list[bytes]]] = []
        self._arrived = asyncio.Event()

    def on_message(self, frames: list[bytes]) -> None:
        self.messages.append((frames[0].decode(), decode(frames[1]), frames[2:]))
        self._arrived.set()

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.messages) < count:
                self._arrived.clear()
                await self._arrived.wait()

    @property
    def said(self) -> list[tuple[str, str]]:
        """(sender, instance id) of the `PeerLost` messages, which the tests count with."""
        return [(sender, getattr(message, "instance_id", "")) for sender, message, _ in self.messages]


@pytest.fixture
async def make_wire() -> AsyncIterator[MakeWire]:
    wires: list[Wire] = []

    def make(name: str, **options: object) -> Wire:
        wires.append(Wire(name, **options))  # type: ignore[arg-type]
        return wires[-1]

    yield make
    for wire in wires:
        await wire.close()


def watch_handshakes(listener: zmq.asyncio.Socket) -> zmq.asyncio.Socket:
    """Begins to note the connections that a listening socket turns down."""
    failures = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    return listener.get_monitor_socket(
        failures | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_DISCONNECTED
    )


async def one_fails(monitor: zmq.asyncio.Socket) -> None:
    async with asyncio.timeout(30):
        await recv_monitor_message(monitor)


# ---- delivery


async def test_a_message_arrives_with_its_sender_and_its_payload_frames(make_wire: MakeWire) -> None:
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()
    a.connect("b", b.listen(inbox.on_message))
    message = AbortRequests([RequestId("r")], 7)

    assert a.send("b", message, [b"", b"\x00\xff" * 40_000])
    await inbox.wait_for(1)

    assert inbox.messages == [("a", message, [b"", b"\x00\xff" * 40_000])]


async def test_messages_of_one_sender_arrive_in_order(make_wire: MakeWire) -> None:
    """Two senders at once: their messages mix, but neither overtakes itself."""
    receiver, inbox = make_wire("r"), Inbox()
    address = receiver.listen(inbox.on_message)
    senders = [make_wire("a"), make_wire("b")]
    for sender in senders:
        sender.connect("r", address)

    for number in range(300):
        for sender in senders:
            assert sender.send("r", PeerLost(str(number)))
    await inbox.wait_for(600)

    for name in ("a", "b"):
        assert [text for sender, text in inbox.said if sender == name] == [str(n) for n in range(300)]


async def test_both_directions(make_wire: MakeWire) -> None:
    a, b, to_a, to_b = make_wire("a"), make_wire("b"), Inbox(), Inbox()
    a.connect("b", b.listen(to_b.on_message))
    b.connect("a", a.listen(to_a.on_message))
    a.send("b", PeerLost("1"))
    b.send("a", PeerLost("2"))

    await to_a.wait_for(1)
    await to_b.wait_for(1)

    assert (to_a.said, to_b.said) == ([("b", "2")], [("a", "1")])


async def test_what_is_sent_before_the_peer_listens_waits_for_it(make_wire: MakeWire) -> None:
    """Instances are told of each other at once, in any order."""
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()
    address = b.listen(inbox.on_message)
    a.connect("b", address)
    for number in range(10):
        assert a.send("b", PeerLost(str(number)))  # without a turn of the loop in between

    await inbox.wait_for(10)

    assert [text for _, text in inbox.said] == [str(number) for number in range(10)]


async def test_sockets_for_another_thread_send_to_the_same_place(make_wire: MakeWire) -> None:
    """The step thread's tokens."""
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()
    address = b.listen(inbox.on_message)

    def publish() -> None:
        socket = a.publisher(address)
        socket.send_multipart([b"thread", msgspec.msgpack.encode(PeerLost("1"))])
        socket.close(linger=10_000)

    await asyncio.to_thread(publish)
    await inbox.wait_for(1)

    assert inbox.said == [("thread", "1")]


# ---- peers


async def test_a_message_to_an_unknown_peer_is_not_sent(make_wire: MakeWire) -> None:
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()
    assert not a.send("b", PeerLost("1"))

    a.connect("b", b.listen(inbox.on_message))
    assert a.send("b", PeerLost("2"))
    a.disconnect("b")
    a.disconnect("b")

    assert not a.send("b", PeerLost("3"))


async def test_a_new_address_replaces_the_old_one(make_wire: MakeWire) -> None:
    """An instance was started anew under its name: the old process hears nothing more."""
    a, before, after = make_wire("a"), Inbox(), Inbox()
    old, new = make_wire("old"), make_wire("new")
    a.connect("b", old.listen(before.on_message))
    a.send("b", PeerLost("1"))
    await before.wait_for(1)

    a.connect("b", new.listen(after.on_message))
    a.send("b", PeerLost("2"))
    await after.wait_for(1)

    assert (before.said, after.said) == ([("a", "1")], [("a", "2")])


async def test_the_same_address_again_keeps_what_is_on_its_way(make_wire: MakeWire) -> None:
    """Every heartbeat names all addresses."""
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()
    address = b.listen(inbox.on_message)
    for number in range(20):
        a.connect("b", address)
        a.send("b", PeerLost(str(number)))

    await inbox.wait_for(20)

    assert [text for _, text in inbox.said] == [str(number) for number in range(20)]


async def test_a_peer_that_does_not_read_is_not_waited_for(
    make_wire: MakeWire, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is at the address: a bounded number of messages waits, more are dropped."""
    monkeypatch.setattr("pd_serve.wire.HIGH_WATER_MARK", 5)
    a = make_wire("a")
    a.connect("b", "tcp://127.0.0.1:1")

    sent = [a.send("b", PeerLost(str(number))) for number in range(20)]

    assert not all(sent)
    assert "b does not read: a PeerLost is dropped" in caplog.text


# ---- what makes no sense


@pytest.mark.parametrize(
    "frames",
    [
        [b"x", b"\xc1"],
        [b"x", b""],
        [b"x", msgspec.msgpack.encode({"type": "NoSuchMessage"})],
        [b"x", msgspec.msgpack.encode({"type": "PeerLost"})],
        [b"x", msgspec.msgpack.encode({"type": "PeerLost", "instance_id": 5})],
        [b"\xff\xfe", msgspec.msgpack.encode(PeerLost("1"))],
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
async def test_garbage_is_ignored_and_what_follows_is_heard(make_wire: MakeWire, frames: list[bytes]) -> None:
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()

    with a.publisher(b.listen(inbox.on_message)) as stranger:
        stranger.send_multipart(frames)
        stranger.send_multipart([b"a", msgspec.msgpack.encode(PeerLost("1"))])
        await inbox.wait_for(1)

    assert inbox.said == [("a", "1")]


async def test_a_handler_that_fails_does_not_end_the_receiving(
    make_wire: MakeWire, caplog: pytest.LogCaptureFixture
) -> None:
    a, b, inbox = make_wire("a"), make_wire("b"), Inbox()

    def fail_once(frames: list[bytes]) -> None:
        if not caplog.records:
            raise RuntimeError("a bug")
        inbox.on_message(frames)

    a.connect("b", b.listen(fail_once))
    with caplog.at_level(logging.ERROR):
        a.send("b", PeerLost("1"))
        a.send("b", PeerLost("2"))
        await inbox.wait_for(1)

    assert inbox.said == [("a", "2")]
    assert "a bug" in caplog.text


# ---- who may talk


async def test_a_wire_that_leaves_the_machine_needs_keys() -> None:
    with pytest.raises(
        ValueError, match=r"10\.0\.0\.1 leaves this machine: the cluster needs its CURVE keys"
    ):
        Wire("a", "10.0.0.1")


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


async def test_the_cluster_s_keys_are_heard(make_wire: MakeWire) -> None:
    keys, inbox = CurveKeys.generate(), Inbox()
    a, b = make_wire("a", keys=keys), make_wire("b", keys=keys)
    a.connect("b", b.listen(inbox.on_message))

    a.send("b", PeerLost("1"), [b"payload"])
    await inbox.wait_for(1)

    assert inbox.messages == [("a", PeerLost("1"), [b"payload"])]


@pytest.mark.parametrize("stranger_has", ["no keys", "keys of its own", "the cluster's public key"])
async def test_a_stranger_is_not_heard(make_wire: MakeWire, stranger_has: str) -> None:
    """Its message waits for a handshake that fails; then a peer talks, and is all that is heard."""
    keys, others, inbox = CurveKeys.generate(), CurveKeys.generate(), Inbox()
    b, peer = make_wire("b", keys=keys), make_wire("peer", keys=keys)
    address = b.listen(inbox.on_message)
    handshakes = watch_handshakes(b._bound[0])

    with zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
        stranger.linger = 0
        if stranger_has != "no keys":
            guessed = keys if stranger_has == "the cluster's public key" else others
            stranger.curve_serverkey = guessed.public
            stranger.curve_publickey, stranger.curve_secretkey = others.public, others.secret
        stranger.connect(address)
        stranger.send_multipart([b"stranger", msgspec.msgpack.encode(PeerLost("1"))], zmq.NOBLOCK)
        await one_fails(handshakes)
        peer.connect("b", address)
        peer.send("b", PeerLost("2"))
        await inbox.wait_for(1)

    assert inbox.said == [("peer", "2")]


async def test_a_wire_with_other_keys_is_not_heard(make_wire: MakeWire) -> None:
    """Two clusters, and an address that was one's and is the other's now."""
    inbox = Inbox()
    a, b = make_wire("a", keys=CurveKeys.generate()), make_wire("b", keys=CurveKeys.generate())
    address = b.listen(inbox.on_message)
    handshakes = watch_handshakes(b._bound[0])

    a.connect("b", address)
    a.send("b", PeerLost("1"))
    await one_fails(handshakes)

    assert inbox.said == []


async def test_a_listener_without_keys_does_not_read_the_cluster_s_messages(make_wire: MakeWire) -> None:
    """Somebody listens at an address that an instance had: the sender wants the cluster's key there too."""
    inbox = Inbox()
    a, impostor = make_wire("a", keys=CurveKeys.generate()), make_wire("impostor")
    address = impostor.listen(inbox.on_message)
    handshakes = watch_handshakes(impostor._bound[0])

    a.connect("impostor", address)
    a.send("impostor", PeerLost("1"))
    await one_fails(handshakes)

    assert inbox.said == []


async def test_of_a_key_pair_the_public_half_is_checked(make_wire: MakeWire) -> None:
    keys = CurveKeys.generate()
    wire = make_wire("a", keys=keys)

    assert wire.callback("", keys.public)
    assert not wire.callback("", CurveKeys.generate().public)
    assert not make_wire("b").callback("", keys.public)
