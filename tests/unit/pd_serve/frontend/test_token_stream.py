"""Tokens of several owners, as one stream to the API."""

import msgspec
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
)
from vllm.v1.serial_utils import MsgpackEncoder

from migration.messages import RequestId
from pd_serve.comm.messages import AbortRequests, AddRequest, TokenHeader
from pd_serve.frontend.request_tracker import MAX_LOSSES
from tests.unit.pd_serve.frontend.frontend_world import R, World


async def test_tokens_of_two_owners_are_delivered_in_order(world: World) -> None:
    """The destination's first token overtakes the source's second."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    world.tokens("d0", 1, 2, 12)
    assert world.delivered_tokens() == [10]

    world.tokens("p0", 0, 1, 11)
    world.tokens("d0", 1, 3, 13, finish=FinishReason.LENGTH)

    outputs = world.delivered()
    assert [token for output in outputs for token in output.new_token_ids] == [11, 12, 13]
    assert [output.finish_reason for output in outputs] == [None, None, FinishReason.LENGTH]
    assert world.sent(AbortRequests) == []


async def test_a_batch_has_the_slot_of_its_instance(world: World) -> None:
    """vLLM's metrics tell instances apart by slot."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    world.tokens("d0", 1, 1, 11)

    slots = [world.outputs.get_nowait().engine_index for _ in range(2)]

    assert slots == [0, 2]


async def test_a_token_for_a_request_that_has_ended_makes_its_sender_end_it(world: World) -> None:
    """The client has disconnected; a copy of its request runs on an instance that no abort has reached."""
    world.tokens("d1", 3, 5, 15, of="gone")

    assert world.sent(AbortRequests) == [("d1", AbortRequests([RequestId("gone")], None))]
    assert world.delivered() == []


async def test_the_last_token_of_a_request_that_has_ended_needs_no_abort(world: World) -> None:
    world.tokens("d1", 3, 5, 15, finish=FinishReason.STOP, of="gone")

    assert world.sent(AbortRequests) == []


async def test_an_error_of_the_client_ends_its_request_with_the_reason(world: World) -> None:
    invalid: list[tuple[str, str]] = []
    world.requests.invalid = lambda request_id, why: invalid.append((request_id, why))
    world.submit()
    world.tokens("p0", 0, 0, 10, finish=FinishReason.ERROR, stop_reason="no such grammar")

    assert invalid == [(R, "no such grammar")]
    assert world.delivered() == []
    assert world.frontend.num_waiting == 0
    assert not world.requests.requests


async def test_an_abort_of_a_stale_copy_has_the_epoch_of_its_token(world: World) -> None:
    """The instance may own the request again when the abort arrives: the later copy must not end."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    world.tokens("d0", 4, 1, 11)
    world.tokens("p0", 0, 1, 99)

    assert world.sent(AbortRequests) == [("p0", AbortRequests([R], 1))]
    assert world.delivered_tokens() == [10, 11]


async def test_of_two_owners_with_one_epoch_the_second_sender_is_ended(world: World) -> None:
    """A migration is taken back at its source under the epoch at which its destination decodes on."""
    world.submit()
    world.tokens("p0", 2, 0, 10)
    world.tokens("d0", 2, 1, 99)

    assert world.sent(AbortRequests) == [("d0", AbortRequests([R], 3))]
    assert world.delivered_tokens() == [10]


async def test_num_waiting_counts_requests_without_a_first_token(world: World) -> None:
    for name in ("r", "s", "t"):
        world.submit(name)
    assert world.frontend.num_waiting == 3

    world.tokens("p0", 0, 0, 10, of="r")
    assert world.frontend.num_waiting == 2
    world.tokens("p0", 0, 1, 11, of="r", finish=FinishReason.STOP)
    world.requests.abort(["s"])
    assert world.frontend.num_waiting == 1
    world.tokens("p0", 0, 0, 10, of="t", finish=FinishReason.STOP)
    assert world.frontend.num_waiting == 0


async def test_token_gaps_are_counted_by_message(world: World) -> None:
    """Two requests that are in the same steps have the same gaps."""
    gaps: list[dict[float, int]] = []
    world.frontend.tokens._recorder.token_gaps = gaps.append  # type: ignore[assignment,method-assign]
    for now, index in [(100.0, 0), (101.0, 1), (101.5, 2)]:
        world.clock.now = now
        if index == 0:
            world.submit("r")
            world.submit("s")
            world.tokens("p0", 0, 0, 10, of="s")
            world.clock.now += 0.5
        world.tokens("p0", 0, index, 10 + index)
    assert gaps == [{0.5: 1}, {0.5: 1}]


async def test_the_duration_of_a_prefill_is_that_of_the_engine_s_report(world: World) -> None:
    world.clock.now = 100.0
    world.submit()
    world.clock.now = 103.0
    scheduled = EngineCoreEvent(EngineCoreEventType.SCHEDULED, 50.0)
    output = EngineCoreOutput("r", [10], events=[scheduled])
    batch = EngineCoreOutputs(outputs=[output], timestamp=52.0)
    frames = [bytes(frame) for frame in MsgpackEncoder().encode(batch)]
    world.wire.hear_frames(msgspec.msgpack.encode(TokenHeader("p0", [(0, 0, 0)])), *frames)

    (timeline,) = world.requests.find("r")
    assert [(s["stage"], s["begin_s"], s["end_s"]) for s in timeline["stages"][1:]] == [
        ("queue", 0.0, 1.0),
        ("prefill", 1.0, 3.0),
    ]


async def test_a_fork_is_recomputed_from_the_delivered_tokens(world: World) -> None:
    """p0 takes the request back, though d0 had committed it and has continued it with other tokens."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    world.tokens("d0", 1, 1, 11, 12)
    world.tokens("p0", 2, 1, 99)

    [_, (recomputer, add)] = world.sent(AddRequest)
    assert (add.epoch, add.output_token_ids) == (1002, [10, 11, 12])
    assert ("p0", AbortRequests([RequestId("r")], 1002)) in world.sent(AbortRequests)
    world.tokens("d0", 1, 3, 13)
    assert ("d0", AbortRequests([RequestId("r")], 2)) in world.sent(AbortRequests)
    world.tokens(str(recomputer), add.epoch, 3, 23)
    assert world.delivered_tokens() == [10, 11, 12, 23]


async def test_an_instance_whose_tokens_never_fit_ends_the_request_with_an_error(world: World) -> None:
    world.submit()
    for index in range(MAX_LOSSES + 1):
        instance, add = world.sent(AddRequest)[index]
        world.tokens(str(instance), add.epoch, 0, 10, before=[1])
    assert world.delivered()[-1].finish_reason is FinishReason.ERROR
    assert not world.requests.requests
