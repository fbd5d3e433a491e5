"""Handshakes of a peer that has the cluster's key, recorded up to the frame that would admit it."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from loadtests.fuzz.frames import Conversation
from loadtests.fuzz.ports import HOST
from pd_serve.comm.messages import Heartbeat
from pd_serve.comm.wire import CurveKeys, Wire

#: Lengths of a greeting and of CURVE's HELLO with its header. Source: https://rfc.zeromq.org/spec/26
GREETING_BYTES, HELLO_BYTES = 64, 202

#: Time limit of one handshake.
HANDSHAKE_S = 20.0


async def record_handshakes(ports: Sequence[int], keys: CurveKeys) -> list[Conversation]:
    """One conversation for each port: greeting, HELLO and INITIATE. INITIATE does not reach the server.

    A server answers a recorded HELLO, but not a recorded INITIATE: that belongs to another connection.
    """
    return [one for one in await asyncio.gather(*(_record(port, keys) for port in ports)) if one]


async def _record(port: int, keys: CurveKeys) -> Conversation:
    said = bytearray()
    complete = asyncio.Event()

    async def relay(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection(HOST, port)
        answers = asyncio.create_task(_copy(server, to_client))
        try:
            while part := await client.read(4096):
                kept = max(0, GREETING_BYTES + HELLO_BYTES - len(said))
                said.extend(part)
                to_server.write(part[:kept])
                if len(said) > GREETING_BYTES + HELLO_BYTES:
                    break
        finally:
            answers.cancel()
            to_server.close()
            to_client.close()
            complete.set()

    listener = await asyncio.start_server(relay, HOST, 0)
    wire = Wire("fuzz", HOST, keys)
    try:
        wire.connect("server", f"tcp://{HOST}:{listener.sockets[0].getsockname()[1]}")
        wire.send("server", Heartbeat())
        with suppress(TimeoutError):
            async with asyncio.timeout(HANDSHAKE_S):
                await complete.wait()
    finally:
        listener.close()
        await wire.close()
    hello = GREETING_BYTES + HELLO_BYTES
    frames = [bytes(said[:GREETING_BYTES]), bytes(said[GREETING_BYTES:hello]), bytes(said[hello:])]
    return frames if frames[-1] else []


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while part := await source.read(4096):
            target.write(part)
