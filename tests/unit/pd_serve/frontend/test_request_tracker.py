"""Requests from arrival to end: aborts, lost instances, timelines."""

import pytest
from vllm.v1.engine import FinishReason

from migration.messages import RequestId
from pd_serve.comm.membership import MANAGER
from pd_serve.comm.messages import AbortRequests, AddRequest, RequestFailed
from pd_serve.errors import EngineDeadError
from pd_serve.observe.recorder import Observer
from pd_serve.observe.timeline import Timeline
from router.request import NewRequest
from router.slo import NO_SLO, Slo
from tests.members import membership
from tests.unit.pd_serve.frontend.frontend_world import R, World


async def test_an_abort_goes_to_the_owner(world: World) -> None:
    world.submit("r")  # on p0, then on d1
    world.submit("s")  # on p1
    world.tokens("d1", 1, 0, 10)

    world.requests.abort(["r", "s", "unknown"])
    world.requests.abort(["r"])

    assert world.sent(AbortRequests) == [
        ("d1", AbortRequests([R])),
        ("p1", AbortRequests([RequestId("s")])),
    ]
    world.tokens("d1", 1, 1, 11, finish=FinishReason.ABORT)
    assert world.delivered_tokens() == [10]


# ---- loss


async def test_a_lost_request_is_recomputed_from_its_tokens_under_a_higher_epoch(world: World) -> None:
    """Its prefill instance dies; another one continues, and late tokens of the dead one are ignored."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    world.tokens("p0", 0, 1, 11)

    world.leave("p0")

    peer, again = world.sent(AddRequest)[-1]
    assert peer == "p1"
    assert (again.output_token_ids, again.handoff) == ([10, 11], ["d0", "d1"])
    assert again.epoch > 0
    payloads = [payload for _, message, payload in world.wire.sent if isinstance(message, AddRequest)]
    assert payloads[0] == payloads[1]
    world.tokens("p0", 0, 2, 99)
    world.tokens("p1", again.epoch, 2, 12, finish=FinishReason.STOP)
    assert world.delivered_tokens() == [10, 11, 12]


async def test_a_recompute_has_a_reason(world: World) -> None:
    reasons: list[str] = []

    class Reasons(Observer):
        def lost(self, request: Timeline, instance: str, reason: str) -> None:
            reasons.append(reason)

    world.requests._recorder._observers = (Reasons(),)
    world.submit("r")  # on p0, then on p1
    world.leave("p0")
    world.join("p2")
    world.wire.hear(MANAGER, membership(*world.members, api_servers=["api"], leaving=["p1"]))
    world.leave("p1")
    world.requests.recompute(list(world.requests.requests.values()))

    assert reasons == ["died", "stopped", "dropped"]


async def test_only_requests_of_the_lost_instance_are_recomputed(world: World) -> None:
    world.submit("r")
    world.submit("s")

    world.leave("p1")

    assert [(peer, add.request_id) for peer, add in world.sent(AddRequest)] == [
        ("p0", "r"),
        ("p1", "s"),
        ("p0", "s"),
    ]


async def test_a_request_is_lost_with_the_destination_of_its_committed_migration(world: World) -> None:
    """The source reports the commit; the destination dies before its first token."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    world.end_migration("p0", "d0", True)

    world.leave("d0")

    assert world.sent(AddRequest)[-1][1].output_token_ids == [10]


async def test_a_request_committed_to_a_lost_instance_is_recomputed(world: World) -> None:
    world.submit()
    world.tokens("p0", 0, 0, 10)
    world.leave("d0")
    assert len(world.sent(AddRequest)) == 1

    world.end_migration("p0", "d0", True)

    assert world.sent(AddRequest)[-1][1].output_token_ids == [10]
    assert len(world.sent(AddRequest)) == 2


async def test_late_tokens_do_not_make_a_lost_instance_the_owner(world: World) -> None:
    """d0 dies after its first token, which is read after the death and before p0 reports the commit."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    world.leave("d0")
    world.tokens("d0", 1, 1, 11)

    world.end_migration("p0", "d0", True)

    assert world.sent(AddRequest)[-1][1].output_token_ids == [10]
    assert len(world.sent(AddRequest)) == 2


async def test_a_request_with_a_gap_is_recomputed_when_any_instance_is_lost(world: World) -> None:
    """A token of d0 has come, p0's token before it has not, and p0 dies."""
    world.submit()
    world.tokens("p0", 0, 0, 10)
    world.tokens("d0", 1, 2, 12)

    world.leave("p0")

    _, again = world.sent(AddRequest)[-1]
    assert again.output_token_ids == [10]
    world.tokens("d0", 1, 3, 13)
    assert world.sent(AbortRequests) == [("d0", AbortRequests([R], 2))]


async def test_a_request_that_the_engine_cannot_take_ends_with_an_error(world: World) -> None:
    world.submit()
    world.wire.hear("p0", RequestFailed(R, "ValueError: no"))
    world.wire.hear("p0", RequestFailed(R, "ValueError: no"))

    assert [output.finish_reason for output in world.delivered()] == [FinishReason.ERROR]
    assert world.frontend.num_waiting == 0


async def test_a_request_that_no_engine_can_serve_ends_with_its_reason(world: World) -> None:
    invalid: list[tuple[str, str]] = []
    world.requests.invalid = lambda request_id, why: invalid.append((request_id, why))
    world.submit()
    world.wire.hear("p0", RequestFailed(R, "no such grammar", is_invalid=True))

    assert invalid == [(R, "no such grammar")]
    assert world.delivered() == []
    assert world.frontend.num_waiting == 0


async def test_migrations_are_counted_by_reason_and_outcome(world: World) -> None:
    world.submit()
    world.end_migration("p0", "d0", True)
    world.end_migration("p0", "d0", False, "full")

    assert world.frontend.snapshot().migrations == {
        "handoff": {"committed": 0, "aborted": 0},
        "manual": {"committed": 1, "aborted": 1},
    }


# ---- timelines


async def test_a_request_s_timeline_is_kept(world: World) -> None:
    """From the messages of instances, with the events of the recorder's tests, also after its end."""
    world.clock.now = 100.0
    world.submit()
    world.clock.now = 101.0
    world.tokens("p0", 0, 0, 10)
    world.clock.now = 102.0
    world.tokens("d0", 1, 1, 11)
    world.end_migration("p0", "d0", True, duration_s=0.5, blocks=2)
    world.clock.now = 105.0
    world.tokens("d0", 1, 2, 12)

    (running,) = world.requests.find("r")
    assert (running["state"], running["output_tokens"], running["longest_gap_s"]) == ("decode", 3, 3.0)
    world.tokens("d0", 1, 3, 13, finish=FinishReason.STOP)

    (timeline,) = world.requests.find("r")
    assert (timeline["state"], timeline["outcome"], timeline["output_tokens"]) == ("ended", "stop", 4)
    assert [(s["stage"], s["instance"], s["begin_s"], s["end_s"]) for s in timeline["stages"]] == [
        ("dispatch", "p0", 0.0, 0.0),
        ("prefill", "p0", 0.0, 1.0),
        ("handoff", "p0", 1.0, 2.0),
        ("decode", "d0", 2.0, 5.0),
    ]
    assert [(m["begin_s"], m["downtime_s"]) for m in timeline["migrations"]] == [(1.5, 1.0)]
    assert world.requests.find("s") == []


async def test_the_timeline_of_a_refused_request_ends_with_an_error(empty: World) -> None:
    with pytest.raises(EngineDeadError):
        empty.requests.submit("r", [b"payload"], NewRequest(32))

    assert [(r["state"], r["outcome"]) for r in empty.requests.find("r")] == [("ended", "error")]


# ---- targets


async def test_a_request_that_is_resumed_has_no_targets_to_meet(world: World) -> None:
    """It arrived at another API server: how long ago, this one cannot know."""
    new = NewRequest(20, slo=Slo(1.0, 0.1))
    fresh = world.requests.submit("fresh", [b"payload"], new)
    resumed = world.requests.submit("resumed", [b"payload"], new, holder="p0")

    assert (fresh.new.slo, resumed.new.slo) == (Slo(1.0, 0.1), NO_SLO)
