"""Outputs that are encoded and sent beside the engine's steps."""

import asyncio
import threading
from collections.abc import Collection, Sequence
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.serial_utils import MsgpackEncoder

from migration.engine_interface import HeldRequest
from migration.messages import RequestId
from migration.token_span import TokenSpan
from pd_serve.api.codec import VllmCodec
from pd_serve.comm.messages import RequestReport, TokenHeader
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.instance.output_thread import OutputThread
from pd_serve.instance.token_publisher import TokenPublisher

REPORT = RequestReport(3, 7, [HeldRequest(RequestId("r"), 0, 1)])


class RecordingPublisher(TokenPublisher):
    """Records instead of sending.

    Attributes:
        may_send: Cleared, it hangs.
        sent: The client and what went to it, in order.
        threads: Those that it was used on, besides that of `close`.
    """

    def __init__(self) -> None:
        self.may_send = threading.Event()
        self.may_send.set()
        self.sent: list[tuple[str, object]] = []
        self.threads: set[int] = set()
        self.num_closed = 0

    def publish(self, client: str, outputs: Sequence[Any], spans: list[TokenSpan]) -> None:
        self._record(client, outputs)

    def report(self, client: str, report: RequestReport) -> None:
        self._record(client, report)

    def retain(self, clients: Collection[str]) -> None:
        self._record("", set(clients))

    def close(self) -> None:
        self.num_closed += 1

    def _record(self, client: str, what: object) -> None:
        self.may_send.wait()
        self.threads.add(threading.get_ident())
        self.sent.append((client, what))


def encode(outputs: Any) -> Sequence[Any]:
    if outputs == "bad":
        raise ValueError("cannot be encoded")
    return [f"encoded {outputs}"]


def test_everything_is_sent_in_the_order_of_the_calls_before_it_is_closed() -> None:
    publisher, failures = RecordingPublisher(), list[BaseException]()
    thread = OutputThread(publisher, encode, failures.append)
    expected: list[tuple[str, object]] = []

    for step in range(100):
        client = f"client-{step % 3}"
        thread.publish(client, step, [(0, step, 0)])
        thread.report(client, REPORT)
        expected += [(client, [f"encoded {step}"]), (client, REPORT)]
    thread.retain({"client-0"})
    thread.close()

    assert publisher.sent == [*expected, ("", {"client-0"})]
    assert (publisher.num_closed, failures) == (1, [])


def test_the_step_does_not_wait_for_what_is_sent() -> None:
    publisher = RecordingPublisher()
    publisher.may_send.clear()
    thread = OutputThread(publisher, encode, lambda error: None)

    for step in range(3):
        thread.publish("client", step, [])
    assert publisher.sent == []

    publisher.may_send.set()
    thread.close()
    assert [what for _, what in publisher.sent] == [["encoded 0"], ["encoded 1"], ["encoded 2"]]
    assert publisher.threads.isdisjoint({threading.get_ident()})


def test_an_output_that_cannot_be_encoded_is_a_failure_after_which_nothing_is_sent() -> None:
    publisher, failed = RecordingPublisher(), threading.Event()
    failures: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failures.append(error)
        failed.set()

    thread = OutputThread(publisher, encode, fail)
    thread.publish("client", "good", [])
    thread.publish("client", "bad", [])
    thread.publish("client", "later", [])
    assert failed.wait(30)
    thread.close()
    thread.close()

    assert [str(error) for error in failures] == ["cannot be encoded"]
    assert publisher.sent == [("client", ["encoded good"])]


def test_a_thread_that_hangs_keeps_its_sockets_and_lets_the_instance_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pd_serve.instance.output_thread.CLOSE_S", 0.05)
    publisher = RecordingPublisher()
    publisher.may_send.clear()
    thread = OutputThread(publisher, encode, lambda error: None)
    thread.publish("client", 1, [])

    thread.close()
    assert publisher.num_closed == 0
    assert "outputs are not sent" in caplog.text

    publisher.may_send.set()
    monkeypatch.undo()
    thread.close()
    assert (publisher.num_closed, len(publisher.sent)) == (1, 1)


async def test_outputs_of_steps_arrive_at_the_token_endpoint_in_order_with_their_report() -> None:
    keys = CurveKeys.generate()
    wire, api_server = Wire("p0", "127.0.0.1", keys), Wire("api", "127.0.0.1", keys)
    codec, arrived = VllmCodec(), list[tuple[TokenHeader, EngineCoreOutputs]]()
    client = api_server.listen_for_frames(lambda frames: arrived.append(codec.decode(frames)))
    thread = OutputThread(TokenPublisher("p0", wire), MsgpackEncoder().encode, lambda error: None)

    for step in range(3):
        thread.publish(client, EngineCoreOutputs(outputs=[EngineCoreOutput("r", [step])]), [(0, step, 0)])
    thread.report(client, REPORT)
    async with asyncio.timeout(30):
        while len(arrived) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    thread.close()
    await wire.close()
    await api_server.close()

    assert [header for header, _ in arrived] == [
        *(TokenHeader("p0", [(0, step, 0)]) for step in range(3)),
        TokenHeader("p0", [], REPORT),
    ]
    assert [batch.outputs[0].new_token_ids for _, batch in arrived[:3]] == [[0], [1], [2]]
