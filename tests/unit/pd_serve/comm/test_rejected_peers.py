"""Connections without the cluster's secret: rejected, and logged once per address."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
import zmq
import zmq.asyncio

from pd_serve.comm.messages import SetRole, ToInstance
from pd_serve.comm.rejected_peers import RejectedPeerLog
from pd_serve.comm.wire import CurveKeys
from tests.unit.pd_serve.comm.wire_world import KEYS, Inbox, MakeWire

#: The first bytes of a peer that has not shown yet whether it has the keys. Source: ZMTP 3.1, greeting.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)


@contextmanager
def rejected_peer(address: str, has: str) -> Iterator[None]:
    """A process without the cluster's keys, which sends a message and reconnects every millisecond."""
    others = CurveKeys.generate()
    with zmq.Context() as context, context.socket(zmq.PUSH) as pushing:
        pushing.linger, pushing.reconnect_ivl = 0, 1
        if has != "no keys":
            guessed = KEYS if has == "the cluster's public key" else others
            pushing.curve_serverkey = guessed.public
            pushing.curve_publickey, pushing.curve_secretkey = others.public, others.secret
        pushing.connect(address)
        pushing.send_multipart([b"rejected_peer", msgspec.msgpack.encode(SetRole("1"))], zmq.NOBLOCK)
        yield


def lines(caplog: pytest.LogCaptureFixture, by: str) -> list[str]:
    """About peers that were refused, or that left first: without any keys, ZeroMQ may close at either end."""
    return [
        message for message in caplog.messages if message.startswith(f"{by}: ") and " a peer at " in message
    ]


def refusals(caplog: pytest.LogCaptureFixture, by: str) -> list[str]:
    return [line for line in lines(caplog, by) if "refused a peer at 127.0.0.1," in line]


async def refused(caplog: pytest.LogCaptureFixture, by: str) -> None:
    """Returns when there is a line about it."""
    async with asyncio.timeout(30):
        while not lines(caplog, by):  # noqa: ASYNC110 - no event to wait for
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("has", ["no keys", "keys of its own", "the cluster's public key"])
async def test_messages_of_a_rejected_peer_are_not_received(
    make_wire: MakeWire, caplog: pytest.LogCaptureFixture, has: str
) -> None:
    """Its message waits for a handshake that fails; then only the message of a peer with the keys arrives."""
    caplog.set_level("INFO")
    inbox = Inbox()
    b, peer = make_wire("b"), make_wire("peer")
    address = b.listen(ToInstance, inbox.on_message)

    with rejected_peer(address, has):
        await refused(caplog, "b")
        peer.connect("b", address)
        peer.send("b", SetRole("2"))
        await inbox.wait_for(1)

    assert inbox.received == [("peer", "2")]


async def test_repeated_attempts_of_rejected_peers_are_one_log_line(
    make_wire: MakeWire, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = 0
    note = RejectedPeerLog._note_refused

    def count(log: RejectedPeerLog, peer: str) -> None:
        nonlocal noted
        noted += 1
        note(log, peer)

    monkeypatch.setattr(RejectedPeerLog, "_note_refused", count)
    address = make_wire("b").listen(ToInstance, Inbox().on_message)

    with rejected_peer(address, "no keys"), rejected_peer(address, "keys of its own"):
        async with asyncio.timeout(30):
            while noted < 20:  # noqa: ASYNC110 - no event to wait for
                await asyncio.sleep(0.01)

    assert len(refusals(caplog, "b")) == 1


async def test_messages_of_a_wire_with_other_keys_are_not_received(
    make_wire: MakeWire, caplog: pytest.LogCaptureFixture
) -> None:
    """Two clusters, and an address that was one's and is the other's now."""
    inbox = Inbox()
    a, b = make_wire("a", keys=CurveKeys.generate()), make_wire("b")

    a.connect("b", b.listen(ToInstance, inbox.on_message))
    a.send("b", SetRole("1"))
    await refused(caplog, "b")

    assert inbox.received == []


async def test_a_peer_that_dies_in_its_handshake_hides_none_that_is_refused(
    make_wire: MakeWire, caplog: pytest.LogCaptureFixture
) -> None:
    """Processes of the cluster may die there, at the address of a stranger."""
    caplog.set_level("INFO")
    address = make_wire("b").listen(ToInstance, Inbox().on_message)
    host, port = address.removeprefix("tcp://").split(":")

    for sent in (b"", GREETING[:20], GREETING):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while await asyncio.to_thread(connection.recv, 4096):
                pass  # until the wire has closed the connection
    await refused(caplog, "b")
    assert refusals(caplog, "b") == []

    with rejected_peer(address, "keys of its own"):
        async with asyncio.timeout(30):
            while not refusals(caplog, "b"):  # noqa: ASYNC110 - no event to wait for
                await asyncio.sleep(0.01)
    assert len(lines(caplog, "b")) == 2


async def test_a_bounded_number_of_addresses_is_logged_each_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pd_serve.comm.rejected_peers.MAX_ADDRESSES", 2)
    log = RejectedPeerLog("b", "an unknown address")

    for address in ("10.0.0.1", "10.0.0.2", "10.0.0.1", "10.0.0.3"):
        log._note_refused(address)

    assert [message.split(",")[0] for message in caplog.messages] == [
        "b: refused a peer at 10.0.0.1",
        "b: refused a peer at 10.0.0.2",
    ]
