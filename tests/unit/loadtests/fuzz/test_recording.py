"""Recorded handshakes, at a real socket."""

import asyncio

from loadtests.fuzz.recording import record_handshakes
from pd_serve.comm.messages import Heartbeat
from pd_serve.comm.wire import CurveKeys, Wire


async def test_a_handshake_is_recorded_and_no_message_arrives() -> None:
    keys, received = CurveKeys.generate(), []
    server = Wire("server", "127.0.0.1", keys)
    address = server.listen(Heartbeat, lambda sender, message, payload: received.append(message))
    port = int(address.rpartition(":")[2])

    (conversation,) = await record_handshakes([port], keys)
    await asyncio.sleep(0.1)
    await server.close()

    greeting, hello, initiate = conversation
    assert greeting[12:17] == b"CURVE"
    assert hello[:8] == b"\x04\xc8\x05HELLO"
    assert b"INITIATE" in initiate
    assert received == []
