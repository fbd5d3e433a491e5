"""Remote calls: answers, errors, time-outs, and what a failing handler does."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from migration.messages import InstanceId, RequestId
from pd_serve.comm.messages import ToApiServer
from pd_serve.comm.requests import Call, CheckIntegrity, ListRequests, MoveRequest, ReadMetrics
from pd_serve.comm.rpc import Answer, RpcClient, RpcServer
from pd_serve.comm.timing import CALL_TIMEOUT_S
from pd_serve.errors import (
    EngineDeadError,
    InvalidRequestError,
    MigrationRefusedError,
    OverloadedError,
    PdServeError,
    RefusalCode,
    UnknownTargetError,
)
from tests.recording_wire import RecordingWire
from tests.unit.pd_serve.made_migrations import migrated
from tests.virtual_time import in_virtual_time


class Caller:
    """The calling side in an API server, connected to p0 and p1."""

    def __init__(self) -> None:
        self.wire = RecordingWire("api")
        self.client = RpcClient(self.wire, Call)
        self.wire.listen(ToApiServer, lambda sender, message, payload: self.client.on_answer(sender, message))
        for peer in ("p0", "p1"):
            self.wire.connect(peer, f"tcp://{peer}")

    async def call(self, request: Any, peer: str = "p0") -> tuple["asyncio.Task[Any]", str]:
        """Starts a call. Returns its task and the id of the call."""
        task = asyncio.create_task(self.client.call(peer, request))
        await asyncio.sleep(0)
        return task, self.wire.sent_to(Call, peer)[-1].call_id

    def answer(self, answer: Answer, peer: str = "p0") -> None:
        self.wire.hear(peer, answer)


@in_virtual_time
async def test_an_answer_arrives_as_the_result_type_of_the_request() -> None:
    caller = Caller()
    record = migrated(blocks=3)
    task, call_id = await caller.call(MoveRequest(RequestId("r"), InstanceId("d0")))

    caller.answer(Answer(call_id, record))

    assert await task == record


@in_virtual_time
async def test_an_answer_of_another_peer_than_the_called_one_is_ignored() -> None:
    caller = Caller()
    task, call_id = await caller.call(CheckIntegrity())

    caller.answer(Answer(call_id, ["from p1"]), "p1")
    caller.answer(Answer(call_id, ["from p0"]))

    assert await task == ["from p0"]


@pytest.mark.parametrize(
    "error",
    [
        PdServeError("why"),
        InvalidRequestError("why"),
        UnknownTargetError("why"),
        MigrationRefusedError("why"),
        MigrationRefusedError("why", RefusalCode.NO_FREE_BLOCKS),
    ],
)
@in_virtual_time
async def test_an_error_arrives_with_its_class_text_and_refusal_code(error: PdServeError) -> None:
    caller = Caller()
    task, call_id = await caller.call(CheckIntegrity())

    caller.answer(Answer.of(call_id, error))

    with pytest.raises(type(error), match="why") as raised:
        await task
    assert type(raised.value) is type(error)
    assert getattr(raised.value, "code", None) == getattr(error, "code", None)


@in_virtual_time
async def test_an_error_of_another_class_arrives_as_a_dead_engine() -> None:
    caller = Caller()
    task, call_id = await caller.call(CheckIntegrity())

    caller.answer(Answer.of(call_id, OverloadedError("too many requests wait")))

    with pytest.raises(EngineDeadError, match="too many requests wait"):
        await task


@in_virtual_time
async def test_a_call_to_a_peer_that_is_not_connected_fails_at_once() -> None:
    with pytest.raises(EngineDeadError, match="p7 is not connected"):
        await Caller().client.call("p7", CheckIntegrity())


@in_virtual_time
async def test_a_call_without_an_answer_times_out_and_its_late_answer_is_ignored() -> None:
    caller = Caller()
    task, call_id = await caller.call(CheckIntegrity())

    await asyncio.sleep(CALL_TIMEOUT_S - 1)
    assert not task.done()
    await asyncio.sleep(2)
    with pytest.raises(TimeoutError):
        task.result()

    caller.answer(Answer(call_id, []))
    assert len(caller.wire.failures) == 0


@in_virtual_time
async def test_the_second_of_two_answers_is_ignored() -> None:
    caller = Caller()
    task, call_id = await caller.call(CheckIntegrity())

    caller.answer(Answer(call_id, ["first"]))
    caller.answer(Answer(call_id, ["second"]))

    assert await task == ["first"]
    caller.answer(Answer(call_id, ["third"]))


@in_virtual_time
async def test_an_answer_to_an_unknown_call_ends_no_other_call() -> None:
    caller = Caller()
    task, call_id = await caller.call(CheckIntegrity())

    caller.answer(Answer("unknown", ["of another call"]))
    caller.answer(Answer(call_id, ["its own"]))

    assert await task == ["its own"]


@in_virtual_time
async def test_two_processes_of_one_name_never_share_a_call_id() -> None:
    """A manager that takes over gets the late answers to its predecessor's calls."""
    earlier, later = Caller(), Caller()
    cut_off, earlier_id = await earlier.call(CheckIntegrity())
    task, later_id = await later.call(CheckIntegrity())

    later.answer(Answer(earlier_id, ["asked by its predecessor"]))
    later.answer(Answer(later_id, ["its own"]))

    assert await task == ["its own"]
    cut_off.cancel()
    await asyncio.gather(cut_off, return_exceptions=True)


@in_virtual_time
async def test_a_lost_peer_fails_the_calls_to_it_and_no_others() -> None:
    caller = Caller()
    to_lost, _ = await caller.call(CheckIntegrity(), "p0")
    to_other, call_id = await caller.call(CheckIntegrity(), "p1")

    caller.client.peer_lost("p0")
    caller.client.peer_lost("p0")

    with pytest.raises(EngineDeadError, match="p0 has died"):
        await to_lost
    caller.answer(Answer(call_id, []), "p1")
    assert await to_other == []


@in_virtual_time
async def test_an_answer_to_a_cancelled_caller_is_ignored() -> None:
    caller = Caller()
    task, call_id = await caller.call(CheckIntegrity())

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    caller.answer(Answer(call_id, []))
    caller.client.peer_lost("p0")

    assert task.cancelled()


# ---- the answering side


async def answer_of(handler: Callable[[str, Any], Awaitable[Any]]) -> tuple[Answer, RecordingWire]:
    """What the server p0 answers to a `CheckIntegrity` of "api", with this handler."""
    wire = RecordingWire("p0")
    wire.connect("api", "tcp://api")
    server = RpcServer(wire, {CheckIntegrity: handler})
    server.on_call("api", "call", CheckIntegrity())
    for _ in range(5):
        await asyncio.sleep(0)
    await server.close()
    [answer] = wire.sent_to(Answer, "api")
    assert answer.call_id == "call"
    return answer, wire


@in_virtual_time
async def test_the_result_of_a_handler_is_answered_to_the_caller() -> None:
    async def handler(sender: str, request: CheckIntegrity) -> list[str]:
        return [sender, type(request).__name__]

    answer, _ = await answer_of(handler)

    assert (answer.result, answer.error) == (["api", "CheckIntegrity"], None)


@in_virtual_time
async def test_an_error_that_a_handler_raises_is_answered_and_counts_as_no_failure() -> None:
    async def handler(sender: str, request: CheckIntegrity) -> list[str]:
        raise UnknownTargetError("no such instance")

    answer, wire = await answer_of(handler)

    assert type(answer.raised()) is UnknownTargetError
    assert str(answer.raised()) == "no such instance"
    assert len(wire.failures) == 0


@in_virtual_time
async def test_an_unexpected_error_of_a_handler_is_answered_and_counted() -> None:
    async def handler(sender: str, request: CheckIntegrity) -> list[str]:
        raise KeyError("a bug")

    answer, wire = await answer_of(handler)

    assert isinstance(answer.raised(), EngineDeadError)
    assert answer.error == "KeyError: 'a bug'"
    assert wire.failures.problems() == [
        "p0: serving CheckIntegrity to api failed: KeyError: 'a bug' (1 times)"
    ]


@in_virtual_time
async def test_a_result_that_cannot_be_encoded_is_answered_as_an_error_and_counted() -> None:
    """Without an answer the caller would wait for its time-out."""

    async def handler(sender: str, request: CheckIntegrity) -> Any:
        return object()

    answer, wire = await answer_of(handler)

    assert isinstance(answer.raised(), EngineDeadError)
    assert len(wire.failures) == 1


@in_virtual_time
async def test_a_time_out_inside_of_a_handler_is_answered_as_a_dead_engine() -> None:
    async def handler(sender: str, request: CheckIntegrity) -> list[str]:
        raise TimeoutError

    answer, wire = await answer_of(handler)

    assert isinstance(answer.raised(), EngineDeadError)
    assert answer.error == "no answer in time"
    assert len(wire.failures) == 0


@in_virtual_time
async def test_a_request_without_a_handler_is_answered_as_invalid() -> None:
    wire = RecordingWire("p0")
    wire.connect("api", "tcp://api")
    server = RpcServer(wire, {})

    server.on_call("api", "call", ListRequests("tcp://api/tokens"))
    await asyncio.sleep(0)

    [answer] = wire.sent_to(Answer)
    assert isinstance(answer.raised(), InvalidRequestError)
    assert answer.error == "p0 does not serve ListRequests"
    await server.close()


@in_virtual_time
async def test_closing_cancels_the_handlers_that_run() -> None:
    ended = False

    async def handler(sender: str, request: CheckIntegrity) -> None:
        nonlocal ended
        try:
            await asyncio.sleep(1000)
        finally:
            ended = True

    wire = RecordingWire("p0")
    wire.connect("api", "tcp://api")
    server = RpcServer(wire, {CheckIntegrity: handler})
    server.on_call("api", "call", CheckIntegrity())
    await asyncio.sleep(0)

    await server.close()

    assert ended
    assert wire.sent_to(Answer) == []


async def test_a_handler_can_be_added_later() -> None:
    async def handle(sender: str, request: ReadMetrics) -> str:
        return f"to {sender}"

    wire = RecordingWire("api")
    wire.connect("b", "tcp://b")
    server = RpcServer(wire, {})
    server.serve(ReadMetrics, handle)
    server.on_call("b", "call", ReadMetrics())
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert [answer.result for answer in wire.sent_to(Answer, "b")] == ["to b"]
    await server.close()
