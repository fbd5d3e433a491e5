"""Calls whose answer comes late, from an earlier time, or cannot be sent."""

import asyncio
from typing import Any

import pytest

from pd_serve.comm.requests import Call, CallEngine, FindRequests
from pd_serve.comm.rpc import Answer, RpcClient, RpcServer
from pd_serve.errors import EngineDeadError
from tests.recording_wire import RecordingWire
from tests.virtual_time import in_virtual_time


def a_client() -> tuple[RecordingWire, RpcClient]:
    wire = RecordingWire("manager")
    wire.connect("api", "tcp://api")
    return wire, RpcClient(wire, Call)


@in_virtual_time
async def test_an_answer_to_an_earlier_process_of_the_same_name_is_ignored() -> None:
    (old_wire, old), (wire, client) = a_client(), a_client()
    earlier = asyncio.ensure_future(old.call("api", FindRequests("x")))
    call = asyncio.ensure_future(client.call("api", FindRequests("y")))
    await asyncio.sleep(0)
    client.on_answer(Answer(old_wire.sent_to(Call)[0].call_id, [{"id": "x"}]))
    client.on_answer(Answer(wire.sent_to(Call)[0].call_id, [{"id": "y"}]))
    assert await call == [{"id": "y"}]
    earlier.cancel()


class UnsendableWire(RecordingWire):
    """Cannot encode a result."""

    def send(self, peer: str, message: object, payload: Any = ()) -> bool:
        if isinstance(message, Answer) and message.error is None:
            raise TypeError("Encoding objects of type Lock is unsupported")
        return super().send(peer, message, payload)


@in_virtual_time
async def test_a_result_that_cannot_be_encoded_is_answered_with_an_error() -> None:
    """The caller would wait for its whole time-out otherwise."""

    async def handler(sender: str, request: CallEngine) -> object:
        return object()

    wire = UnsendableWire("decode-0")
    wire.connect("api", "tcp://api")
    server = RpcServer(wire, {CallEngine: handler})
    server.on_call("api", "1", CallEngine("method", []))
    await asyncio.sleep(1)
    (answer,) = wire.sent_to(Answer)
    with pytest.raises(EngineDeadError, match="unsupported"):
        raise answer.raised()
    assert len(wire.failures) == 1
    await server.close()
