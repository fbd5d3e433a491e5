"""The API server's side of the cluster, over a wire that keeps what is sent and says what a test says."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from migration.errors import Refusal, RefusalCode
from migration.messages import RequestId
from pd_serve.api.codec import VllmCodec
from pd_serve.comm.messages import (
    AbortRequests,
    AddRequest,
    Hello,
    InstanceInfo,
    LoadReport,
    MigrateRequest,
    MigrationEnded,
    PeerLost,
    Reply,
    TokenHeader,
)
from pd_serve.errors import EngineDeadError, MigrationRefusedError, UnknownTargetError
from pd_serve.frontend import request_tracker as request_router
from pd_serve.frontend.request_tracker import MAX_RECOMPUTES, RequestTracker
from pd_serve.observe.timeline import ObservedMigration
from router.load import InstanceLoad
from router.request import Demand, NewRequest
from tests.unit.pd_serve.made_migrations import FULL, migrated
from tests.unit.pd_serve.recording_wire import RecordingWire

M = TypeVar("M")
R = RequestId("r")
BLOCK_TOKENS = 16


@dataclass
class Clock:
    """The time that tokens are delivered at."""

    now: float = 100.0


class World:
    """A router and what the instances around it say."""

    def __init__(self) -> None:
        self.wire = RecordingWire("api")
        self.outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self.clock = Clock()
        self.router = RequestTracker(
            "api",
            self.wire,  # type: ignore[arg-type]
            VllmCodec(),
            self.outputs.put_nowait,
            block_tokens=BLOCK_TOKENS,
            num_slots=8,
            clock=lambda: self.clock.now,
        )
        self._encoder = MsgpackEncoder()

    def join(self, *names: str) -> None:
        """Instances join and report; p.. prefill, d.. decode, n.. neutral."""
        for name in names:
            role = {"p": "prefill", "d": "decode", "n": "neutral"}[name[0]]
            info = InstanceInfo(name, role, f"tcp://{name}", "node", 1, None, ["generate"], 512, 100, 16)
            self.router.join(info)
            self.report(name)

    def report(self, name: str, *, stranded: Sequence[str] = (), free: int = 100, **load: Any) -> None:
        role = self.router.instances[name].role if name in self.router.instances else "prefill"
        report = LoadReport(
            InstanceLoad(name, role, total_blocks=100, free_blocks=free, **load),
            [RequestId(r) for r in stranded],
        )
        self.hear(name, report)

    def hear(self, sender: str, message: object) -> None:
        self.wire.receive(sender, message)

    def tokens(
        self,
        source: str,
        epoch: int,
        index: int,
        *ids: int,
        finish: FinishReason | None = None,
        of: str = "r",
    ) -> None:
        output = EngineCoreOutput(of, list(ids), finish_reason=finish)
        frames = [bytes(frame) for frame in self._encoder.encode(EngineCoreOutputs(outputs=[output]))]
        header = msgspec.msgpack.encode(TokenHeader(source, [(epoch, index)]))
        self.wire.listeners[1]([header, *frames])

    def submit(self, request_id: str = "r", prompt_tokens: int = 20) -> AddRequest:
        """Returns what the instance was sent."""
        payload = VllmCodec().encode_request(request(request_id, prompt_tokens))
        self.router.submit(request_id, payload, NewRequest(prompt_tokens))
        return self.sent(AddRequest)[-1][1]

    def sent(self, kind: type[M]) -> list[tuple[str, M]]:
        return [(peer, message) for peer, message, _ in self.wire.sent if isinstance(message, kind)]

    def delivered(self) -> list[EngineCoreOutput]:
        """Everything that the API has been given since the last look."""
        found = []
        while not self.outputs.empty():
            found += self.outputs.get_nowait().outputs
        return found

    def delivered_tokens(self) -> list[int]:
        return [token for output in self.delivered() for token in output.new_token_ids]

    async def migrate(self, destination: str) -> tuple[asyncio.Task[ObservedMigration], str]:
        """Asks for a migration of `r`. Returns its task and, once it is sent, the id of the call."""
        task = asyncio.create_task(self.router.migrate("r", destination))
        await turns()
        return task, self.sent(MigrateRequest)[-1][1].call_id


async def turns() -> None:
    """Lets everything that is ready run; nothing here waits for more than a few turns of the loop."""
    for _ in range(10):
        await asyncio.sleep(0)


def request(request_id: str, prompt_tokens: int) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=list(range(prompt_tokens)),
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=8),
        pooling_params=None,
        arrival_time=1.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def ended(
    call_id: str, source: str, destination: str, refusal: Refusal | None = None, **more: Any
) -> MigrationEnded:
    return MigrationEnded(call_id, migrated(R, source, destination, "manual", refusal, **more))


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Two prefill and two decode instances that are idle."""
    world = World()
    world.join("p0", "p1", "d0", "d1")
    yield world
    await world.router.close()


@pytest.fixture
async def empty() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.router.close()


# ---- dispatch


async def test_a_request_is_sent_to_a_prefill_instance_with_where_it_moves_next(world: World) -> None:
    add = world.submit(prompt_tokens=20)

    [(peer, message, payload)] = [sent for sent in world.wire.sent if isinstance(sent[1], AddRequest)]
    assert peer == "p0"
    assert message == add == AddRequest(R, "api/1", 0, ["d0", "d1"], [])
    assert MsgpackDecoder(EngineCoreRequest).decode(payload) == request("r", 20)


async def test_requests_and_their_hand_offs_are_spread_between_two_reports(world: World) -> None:
    adds = [world.submit(f"r{number}") for number in range(4)]

    assert [peer for peer, _ in world.sent(AddRequest)] == ["p0", "p1", "p0", "p1"]
    assert [add.handoff[0] for add in adds] == ["d0", "d1", "d0", "d1"]


async def test_a_neutral_instance_keeps_what_it_starts(empty: World) -> None:
    empty.join("n0", "d0")

    assert empty.submit().handoff is None


async def test_without_decode_instances_a_request_stays_until_there_is_one(empty: World) -> None:
    empty.join("p0")

    assert empty.submit().handoff == []
    empty.report("p0", stranded=["r"])
    assert empty.sent(MigrateRequest) == []

    empty.join("d0")
    empty.router._routes[R].placed_at = -1e9  # the loop's clock may have just begun
    empty.report("p0", stranded=["r"])
    assert empty.sent(MigrateRequest) == [("p0", MigrateRequest("", R, "d0", "handoff"))]


@pytest.mark.parametrize(("max_tokens", "leaves"), [(0, False), (1, False), (2, True), (None, True)])
async def test_a_request_of_one_token_reserves_no_hand_off(
    world: World, max_tokens: int | None, leaves: bool
) -> None:
    world.router.submit("r", [b"payload"], NewRequest(20), max_tokens=max_tokens)

    [(_, add)] = world.sent(AddRequest)
    assert add.handoff == (["d0", "d1"] if leaves else None)
    expected = world.router._book.projected("d0").expected_blocks
    assert expected == (2 if leaves else 0)


async def test_nor_does_one_that_is_computed_again_for_its_last_token(world: World) -> None:
    world.router.submit("r", [b"payload"], NewRequest(20), max_tokens=3)
    world.tokens("p0", 0, 0, 10)
    world.tokens("p0", 0, 1, 11)

    world.router.leave("p0")

    _, again = world.sent(AddRequest)[-1]
    assert (again.output_token_ids, again.handoff) == ([10, 11], None)


async def test_without_an_instance_that_starts_requests_submit_raises(empty: World) -> None:
    """And nothing of the request is left behind."""
    empty.join("d0")

    with pytest.raises(EngineDeadError, match="no live instance takes new requests"):
        empty.submit()

    assert (empty.router.num_live, empty.router.num_waiting) == (0, 0)
    with pytest.raises(UnknownTargetError):
        await empty.router.migrate("r", "d0")


async def test_only_instances_that_have_reported_count(empty: World) -> None:
    """A report of an instance that is not known (any more) is no report."""
    empty.report("p0")
    assert empty.router.num_live == 0

    empty.join("p0")
    await empty.router.wait_for_reports()
    assert empty.router.num_live == 1

    empty.router.leave("p0")
    empty.report("p0")
    assert empty.router.num_live == 0


# ---- the line of those who wait for room


async def test_a_request_that_no_neutral_instance_has_room_for_waits_and_is_seen_to(empty: World) -> None:
    empty.join("n0", "n1")
    for name in ("n0", "n1"):
        empty.report(name, free=1, running=1)
    for name in ("r", "s"):
        empty.router.submit(name, [b"payload"], NewRequest(32))

    assert empty.sent(AddRequest) == []
    assert empty.router.snapshot()["waiting_line"] == {"requests": 2, "tokens": 64}
    assert empty.router.reports.waiting == Demand(2, 64)
    assert empty.router.num_waiting == 2

    empty.report("n1", free=2, running=1)

    assert [(peer, add.request_id) for peer, add in empty.sent(AddRequest)] == [("n1", "r")]
    assert empty.router.snapshot()["waiting_line"] == {"requests": 1, "tokens": 32}
    empty.router.abort(["s"])
    assert empty.router.snapshot()["waiting_line"] == {"requests": 0, "tokens": 0}
    assert empty.router.num_waiting == 1


# ---- tokens


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


async def test_a_step_s_outputs_are_those_of_its_instance(world: World) -> None:
    """vLLM's metrics tell instances apart by slot."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    world.tokens("d0", 1, 1, 11)

    slots = [world.outputs.get_nowait().engine_index for _ in range(2)]

    assert slots == [0, 2]


async def test_a_token_for_a_request_that_has_ended_makes_its_sender_end_it(world: World) -> None:
    """The client is gone; its request lives on where no abort has found it."""
    world.tokens("d1", 3, 5, 15, of="gone")

    assert world.sent(AbortRequests) == [("d1", AbortRequests([RequestId("gone")], None))]
    assert world.delivered() == []


async def test_the_last_token_of_a_request_that_has_ended_needs_no_abort(world: World) -> None:
    world.tokens("d1", 3, 5, 15, finish=FinishReason.STOP, of="gone")

    assert world.sent(AbortRequests) == []


async def test_a_stale_abort_names_the_epoch_of_the_copy_that_spoke(world: World) -> None:
    """It may own the request again by the time the message is there: that copy must live."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    world.tokens("d0", 4, 1, 11)
    world.tokens("p0", 0, 1, 99)

    assert world.sent(AbortRequests) == [("p0", AbortRequests([R], 1))]
    assert world.delivered_tokens() == [10, 11]


async def test_of_two_owners_under_one_epoch_the_second_to_be_heard_is_ended(world: World) -> None:
    """A migration is taken back at its source under the epoch at which its destination decodes on."""
    world.submit()
    world.tokens("p0", 2, 0, 10)
    world.tokens("d0", 2, 1, 99)

    assert world.sent(AbortRequests) == [("d0", AbortRequests([R], 3))]
    assert world.delivered_tokens() == [10]


async def test_num_waiting_counts_requests_without_a_first_token(world: World) -> None:
    for name in ("r", "s", "t"):
        world.submit(name)
    assert world.router.num_waiting == 3

    world.tokens("p0", 0, 0, 10, of="r")
    assert world.router.num_waiting == 2
    world.tokens("p0", 0, 1, 11, of="r", finish=FinishReason.STOP)
    world.router.abort(["s"])
    assert world.router.num_waiting == 1
    world.tokens("p0", 0, 0, 10, of="t", finish=FinishReason.STOP)
    assert world.router.num_waiting == 0


# ---- abort


async def test_an_abort_goes_to_the_owner(world: World) -> None:
    world.submit("r")  # on p0, then on d1
    world.submit("s")  # on p1
    world.tokens("d1", 1, 0, 10)

    world.router.abort(["r", "s", "unknown"])
    world.router.abort(["r"])

    assert world.sent(AbortRequests) == [
        ("d1", AbortRequests([R])),
        ("p1", AbortRequests([RequestId("s")])),
    ]
    world.tokens("d1", 1, 1, 11, finish=FinishReason.ABORT)
    assert world.delivered_tokens() == [10]


# ---- loss


async def test_a_lost_request_is_recomputed_from_its_tokens_under_a_higher_epoch(world: World) -> None:
    """Its prefill instance dies; another one continues, and what the dead one said late does not count."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    world.tokens("p0", 0, 1, 11)

    world.router.leave("p0")

    peer, again = world.sent(AddRequest)[-1]
    assert peer == "p1"
    assert (again.output_token_ids, again.handoff) == ([10, 11], ["d0", "d1"])
    assert again.epoch > 0
    payloads = [payload for _, message, payload in world.wire.sent if isinstance(message, AddRequest)]
    assert payloads[0] == payloads[1]
    world.tokens("p0", 0, 2, 99)
    world.tokens("p1", again.epoch, 2, 12, finish=FinishReason.STOP)
    assert world.delivered_tokens() == [10, 11, 12]


async def test_the_others_are_told_of_a_loss(world: World) -> None:
    world.router.leave("d0")
    world.router.leave("d0")

    assert [peer for peer, _ in world.sent(PeerLost)] == ["p0", "p1", "d1"]
    assert set(world.sent(Hello)[-1][1].peers) == {"p0", "p1", "d1"}


async def test_only_requests_of_the_lost_instance_are_recomputed(world: World) -> None:
    world.submit("r")
    world.submit("s")

    world.router.leave("p1")

    assert [(peer, add.request_id) for peer, add in world.sent(AddRequest)] == [
        ("p0", "r"),
        ("p1", "s"),
        ("p0", "s"),
    ]


async def test_a_request_dies_with_the_instance_it_has_been_committed_to(world: World) -> None:
    """The source said that it has left; the destination dies before its first token."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    world.hear("p0", ended("", "p0", "d0"))

    world.router.leave("d0")

    assert world.sent(AddRequest)[-1][1].output_token_ids == [10]


async def test_a_commit_to_an_instance_that_is_lost_already_is_a_loss(world: World) -> None:
    world.submit()
    world.tokens("p0", 0, 0, 10)
    world.router.leave("d0")
    assert len(world.sent(AddRequest)) == 1

    world.hear("p0", ended("", "p0", "d0"))

    assert world.sent(AddRequest)[-1][1].output_token_ids == [10]
    assert len(world.sent(AddRequest)) == 2


async def test_late_tokens_do_not_make_a_lost_instance_the_owner(world: World) -> None:
    """d0 dies after its first token, which is read after the death and before p0's word of the commit."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    world.router.leave("d0")
    world.tokens("d0", 1, 1, 11)

    world.hear("p0", ended("", "p0", "d0"))

    assert world.sent(AddRequest)[-1][1].output_token_ids == [10]
    assert len(world.sent(AddRequest)) == 2


async def test_with_a_gap_the_tokens_in_it_may_be_lost_with_any_instance(world: World) -> None:
    """d0 has spoken, p0's token before that has not come, and p0 dies."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    world.tokens("d0", 1, 2, 12)

    world.router.leave("p0")

    _, again = world.sent(AddRequest)[-1]
    assert again.output_token_ids == [10]
    world.tokens("d0", 1, 3, 13)
    assert world.sent(AbortRequests) == [("d0", AbortRequests([R], 2))]


async def test_without_another_instance_a_lost_request_ends_with_an_error(empty: World) -> None:
    empty.join("p0", "d0")
    empty.submit()

    empty.router.leave("p0")

    assert [(output.request_id, output.finish_reason) for output in empty.delivered()] == [
        ("r", FinishReason.ERROR)
    ]
    assert empty.router.num_waiting == 0


async def test_a_request_that_loses_too_many_instances_ends_with_an_error(world: World) -> None:
    world.submit()
    for losses in range(MAX_RECOMPUTES + 1):
        assert world.delivered() == [], f"after {losses} losses"
        owner, _ = world.sent(AddRequest)[-1]
        world.router.leave(owner)
        world.join(owner)

    assert [output.finish_reason for output in world.delivered()] == [FinishReason.ERROR]
    assert len(world.sent(AddRequest)) == 1 + MAX_RECOMPUTES


async def test_a_request_that_the_engine_cannot_take_ends_with_an_error(world: World) -> None:
    world.submit()
    world.hear("p0", Reply("add:r", error="ValueError: no"))
    world.hear("p0", Reply("add:r", error="ValueError: no"))

    assert [output.finish_reason for output in world.delivered()] == [FinishReason.ERROR]
    assert world.router.num_waiting == 0


# ---- requests that wait for a decode instance


async def test_a_stranded_request_is_placed_when_a_decode_instance_has_room(
    empty: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 prompt tokens and one more: two blocks, and one to grow."""
    monkeypatch.setattr(request_router, "PLACE_AGAIN_S", 1e6)
    empty.join("p0", "d0")
    empty.submit(prompt_tokens=20)
    empty.router._routes[R].placed_at = -1e9  # the loop's clock may have just begun
    empty.hear("p0", ended("", "p0", "d0", FULL))
    for free in (0, 2):
        empty.report("d0", free=free)
        empty.report("p0", stranded=["r"])
        assert empty.sent(MigrateRequest) == []

    empty.report("d0", free=3)
    empty.report("p0", stranded=["r"])
    assert empty.sent(MigrateRequest) == [("p0", MigrateRequest("", R, "d0", "handoff"))]

    empty.report("p0", stranded=["r"])  # it has just been asked
    assert len(empty.sent(MigrateRequest)) == 1


async def test_two_stranded_requests_do_not_share_one_room(empty: World) -> None:
    empty.join("p0", "d0")
    for name in ("r", "s"):
        empty.submit(name, prompt_tokens=20)
        empty.hear("p0", MigrationEnded("", migrated(name, refusal=FULL)))
    empty.report("d0", free=4)

    empty.report("p0", stranded=["r", "s"])

    assert [message.request_id for _, message in empty.sent(MigrateRequest)] == ["r"]


async def test_a_stranded_request_that_has_another_owner_or_has_ended_is_left_alone(world: World) -> None:
    world.submit()
    world.tokens("d0", 1, 0, 10)

    world.report("p0", stranded=["r", "unknown"])

    assert world.sent(MigrateRequest) == []


# ---- migration on demand


async def test_migrate_returns_what_it_cost(world: World) -> None:
    """It is over with the first token from the destination, which may come long after the commit."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    task, call_id = await world.migrate("d1")
    assert world.sent(MigrateRequest) == [("p0", MigrateRequest(call_id, R, "d1", "manual"))]

    world.hear("p0", ended(call_id, "p0", "d1", stages=2, blocks=3, tokens=21))
    await turns()
    assert not task.done()
    world.clock.now += 0.25
    world.tokens("d1", 1, 1, 11)

    moved = await task
    assert moved.downtime_ms == 250.0
    assert (moved.record.stages, moved.record.blocks, moved.record.tokens) == (2, 3, 21)


async def test_migrate_of_an_unknown_request_or_to_an_unknown_instance(world: World) -> None:
    with pytest.raises(UnknownTargetError, match="no running request 'r'"):
        await world.router.migrate("r", "d0")
    world.submit()
    with pytest.raises(UnknownTargetError, match="no instance 'd9'"):
        await world.router.migrate("r", "d9")


async def test_a_refused_migration_says_why(world: World) -> None:
    world.submit()
    task, call_id = await world.migrate("d0")

    world.hear("p0", ended(call_id, "p0", "d0", Refusal(RefusalCode.NO_FREE_BLOCKS, "no free blocks")))

    with pytest.raises(MigrationRefusedError, match="no free blocks") as refused:
        await task
    assert refused.value.code is RefusalCode.NO_FREE_BLOCKS


async def test_migrate_follows_a_request_that_has_just_moved_on(world: World) -> None:
    """The hand-off was under way: the new owner is asked."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    task, call_id = await world.migrate("d1")

    world.tokens("d0", 1, 1, 11)
    world.hear("p0", ended(call_id, "p0", "d1", Refusal(RefusalCode.NOT_RUNNING, "not here")))
    await turns()
    peer, message = world.sent(MigrateRequest)[-1]
    assert (peer, message.destination) == ("d0", "d1")
    world.hear("d0", ended(message.call_id, "d0", "d1", stages=1))
    world.tokens("d1", 2, 2, 12)

    assert (await task).record.stages == 1


async def test_a_migration_whose_source_dies_is_refused_and_the_request_goes_on(world: World) -> None:
    world.submit()
    world.tokens("p0", 0, 0, 10)
    task, _ = await world.migrate("d0")

    world.router.leave("p0")

    with pytest.raises(MigrationRefusedError, match="p0 has died; the request is recomputed elsewhere"):
        await task
    assert world.sent(AddRequest)[-1][0] == "p1"


async def test_a_request_that_ends_right_after_the_commit_ends_the_wait(world: World) -> None:
    """The client goes away before the destination's first token."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    task, call_id = await world.migrate("d0")
    world.hear("p0", ended(call_id, "p0", "d0", stages=1))
    await turns()

    world.router.abort(["r"])

    assert (await task).record.stages == 1


async def test_migrations_are_counted_by_reason_and_outcome(world: World) -> None:
    """What all API servers are told; the answer to a call is not counted again."""
    world.submit()
    world.hear("p0", ended("", "p0", "d0"))
    world.hear("p0", ended("", "p0", "d0", FULL))
    world.hear("p0", ended("api.0", "p0", "d0"))

    assert world.router.snapshot()["migrations"] == {
        "handoff": {"committed": 0, "aborted": 0},
        "manual": {"committed": 1, "aborted": 1},
    }


# ---- timelines


async def test_a_request_s_timeline_is_kept(world: World) -> None:
    """From what instances say, in the words of the recorder's own tests; while it runs and afterwards."""
    world.clock.now = 100.0
    world.submit()
    world.clock.now = 101.0
    world.tokens("p0", 0, 0, 10)
    world.clock.now = 102.0
    world.tokens("d0", 1, 1, 11)
    world.hear("p0", ended("", "p0", "d0", duration_s=0.5, blocks=2))
    world.clock.now = 105.0
    world.tokens("d0", 1, 2, 12)

    (running,) = world.router.find_requests("r")
    assert (running["state"], running["output_tokens"], running["longest_gap_s"]) == ("decode", 3, 3.0)
    world.tokens("d0", 1, 3, 13, finish=FinishReason.STOP)

    (timeline,) = world.router.find_requests("r")
    assert (timeline["state"], timeline["outcome"], timeline["output_tokens"]) == ("ended", "stop", 4)
    assert [(s["stage"], s["instance"], s["begin_s"], s["end_s"]) for s in timeline["stages"]] == [
        ("dispatch", "p0", 0.0, 0.0),
        ("prefill", "p0", 0.0, 1.0),
        ("handoff", "p0", 1.0, 2.0),
        ("decode", "d0", 2.0, 5.0),
    ]
    assert [(m["begin_s"], m["downtime_s"]) for m in timeline["migrations"]] == [(1.5, 1.0)]
    assert world.router.find_requests("s") == []


async def test_token_gaps_are_counted_by_message(world: World) -> None:
    """Two requests that are in the same steps have the same gaps."""
    gaps: list[dict[float, int]] = []
    world.router._recorder.token_gaps = gaps.append  # type: ignore[assignment,method-assign]
    for now, index in [(100.0, 0), (101.0, 1), (101.5, 2)]:
        world.clock.now = now
        if index == 0:
            world.submit("r")
            world.submit("s")
            world.tokens("p0", 0, 0, 10, of="s")
            world.clock.now += 0.5
        world.tokens("p0", 0, index, 10 + index)
    assert gaps == [{0.5: 1}, {0.5: 1}]


async def test_how_long_a_prefill_took_is_the_engine_s_word(world: World) -> None:
    world.clock.now = 100.0
    world.submit()
    world.clock.now = 103.0
    scheduled = EngineCoreEvent(EngineCoreEventType.SCHEDULED, 50.0)
    output = EngineCoreOutput("r", [10], events=[scheduled])
    batch = EngineCoreOutputs(outputs=[output], timestamp=52.0)
    frames = [bytes(frame) for frame in MsgpackEncoder().encode(batch)]
    world.wire.listeners[1]([msgspec.msgpack.encode(TokenHeader("p0", [(0, 0)])), *frames])

    (timeline,) = world.router.find_requests("r")
    assert [(s["stage"], s["begin_s"], s["end_s"]) for s in timeline["stages"][1:]] == [
        ("queue", 0.0, 1.0),
        ("prefill", 1.0, 3.0),
    ]


async def test_a_refused_request_has_ended(empty: World) -> None:
    with pytest.raises(EngineDeadError):
        empty.router.submit("r", [b"payload"], NewRequest(32))

    assert [(r["state"], r["outcome"]) for r in empty.router.find_requests("r")] == [("ended", "error")]
