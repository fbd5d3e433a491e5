"""Tokens on their way from the step thread to the token endpoints of API servers."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.serial_utils import MsgpackEncoder

from migration.engine_interface import HeldRequest
from migration.messages import RequestId
from pd_serve.api.codec import VllmCodec
from pd_serve.comm.messages import RequestReport, TokenHeader
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.instance.token_publisher import TokenPublisher

KEYS = CurveKeys.generate()


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    wire = Wire("p0", "127.0.0.1", KEYS)
    yield wire
    await wire.close()


def outputs(*token_ids: int) -> Sequence[Any]:
    return MsgpackEncoder().encode(EngineCoreOutputs(outputs=[EngineCoreOutput("r", list(token_ids))]))


async def test_outputs_published_on_a_thread_arrive_at_their_own_token_endpoint_in_order(wire: Wire) -> None:
    codec = VllmCodec()
    arrived: dict[str, list[tuple[TokenHeader, list[int]]]] = {"a": [], "b": []}
    api_servers = {name: Wire(name, "127.0.0.1", KEYS) for name in arrived}

    def listen(name: str) -> str:
        def take(frames: list[bytes]) -> None:
            header, batch = codec.decode(frames)
            arrived[name].append((header, batch.outputs[0].new_token_ids))

        return api_servers[name].listen_for_frames(take)

    a, b = map(listen, arrived)
    publisher = TokenPublisher("p0", wire)

    def step_thread() -> None:
        publisher.publish(a, outputs(10), [(0, 0, 0)])
        publisher.publish(b, outputs(20, 21), [(1, 5, 0)])
        publisher.publish(a, outputs(11), [(0, 1, 0)])

    await asyncio.to_thread(step_thread)
    async with asyncio.timeout(30):
        while sum(map(len, arrived.values())) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    assert arrived == {
        "a": [(TokenHeader("p0", [(0, 0, 0)]), [10]), (TokenHeader("p0", [(0, 1, 0)]), [11])],
        "b": [(TokenHeader("p0", [(1, 5, 0)]), [20, 21])],
    }
    publisher.close()
    for api_server in api_servers.values():
        await api_server.close()


async def test_an_api_server_that_does_not_read_is_logged_and_does_not_block(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pd_serve.comm.wire.HIGH_WATER_MARK", 5)
    publisher = TokenPublisher("p0", wire)

    for index in range(20):
        publisher.publish("tcp://127.0.0.1:1", outputs(index), [(0, index, 0)])

    assert caplog.text.count("the API server at tcp://127.0.0.1:1 does not read") == 1
    assert len(wire.unsent) == 15
    publisher.close()


async def test_nothing_is_kept_for_api_servers_that_are_gone(wire: Wire) -> None:
    """Thirty of them, one after another, with what waits for them."""
    publisher = TokenPublisher("p0", wire)
    before = len(os.listdir("/proc/self/fd"))
    many = outputs(*range(1000))

    for number in range(30):
        client = f"tcp://127.0.0.1:{number + 1}"
        for index in range(100):
            publisher.publish(client, many, [(0, index, 0)])
        publisher.retain({client})
        publisher.report(client, RequestReport(1, 0, []))
    publisher.retain(())

    async with asyncio.timeout(30):
        while len(os.listdir("/proc/self/fd")) > before:  # noqa: ASYNC110 - libzmq closes them in its thread
            await asyncio.sleep(0.05)


async def test_a_report_arrives_after_the_outputs_before_it(wire: Wire) -> None:
    codec, arrived = VllmCodec(), []
    api_server = Wire("api", "127.0.0.1", KEYS)
    client = api_server.listen_for_frames(lambda frames: arrived.append(codec.decode(frames)[0]))
    publisher = TokenPublisher("p0", wire)
    report = RequestReport(3, 7, [HeldRequest(RequestId("r"), 0, 1)])

    publisher.publish(client, outputs(10), [(0, 0, 0)])
    publisher.report(client, report)
    async with asyncio.timeout(30):
        while len(arrived) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    assert arrived == [TokenHeader("p0", [(0, 0, 0)]), TokenHeader("p0", [], report)]
    publisher.close()
    await api_server.close()
