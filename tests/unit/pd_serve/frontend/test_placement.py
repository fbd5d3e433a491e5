"""Where requests start, wait, and are handed off to."""

import pytest
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder

from pd_serve.comm.messages import AddRequest, HandOff, LoadReport
from pd_serve.errors import EngineDeadError
from pd_serve.frontend import placement
from pd_serve.frontend.reconciler import UNHEARD_REPORTS
from pd_serve.frontend.snapshot import WaitingRequests
from router.load import InstanceLoad
from router.request import Demand, NewRequest
from router.slo import Slo
from tests.unit.pd_serve.frontend.frontend_world import R, World, ended, request


async def test_a_request_is_sent_to_a_prefill_instance_with_its_hand_off_candidates(world: World) -> None:
    add = world.submit(prompt_tokens=20)

    [(peer, message, payload)] = [sent for sent in world.wire.sent if isinstance(sent[1], AddRequest)]
    assert peer == "p0"
    assert message == add == AddRequest(R, "tcp://api/tokens", 0, ["d0", "d1"], [])
    assert MsgpackDecoder(EngineCoreRequest).decode(payload) == request("r", 20)


async def test_requests_and_their_hand_offs_are_spread_between_two_reports(world: World) -> None:
    adds = [world.submit(f"r{number}") for number in range(4)]

    assert [peer for peer, _ in world.sent(AddRequest)] == ["p0", "p1", "p0", "p1"]
    assert [add.handoff[0] for add in adds] == ["d0", "d1", "d0", "d1"]


async def test_without_prefill_instances_a_decode_instance_takes_new_requests_and_keeps_them(
    empty: World,
) -> None:
    empty.join("p0", "d0", "d1")
    empty.leave("p0")
    adds = [empty.submit("r"), empty.submit("s")]

    assert [peer for peer, _ in empty.sent(AddRequest)] == ["d0", "d1"]
    assert [add.handoff for add in adds] == [None, None]
    assert empty.frontend.num_live == 2
    empty.join("p1")
    assert empty.submit("t").handoff == ["d0", "d1"]


async def test_prefill_instances_hand_off_to_neutral_instances_too(empty: World) -> None:
    empty.join("p0", "n0", "d0")
    empty.report("n0", free=90, running=1)
    empty.report("d0", free=40, running=4)

    assert empty.submit().handoff == ["n0", "d0"]


async def test_a_neutral_instance_keeps_what_it_starts(empty: World) -> None:
    empty.join("n0", "d0")

    assert empty.submit().handoff is None


async def test_without_decode_instances_a_request_stays_until_there_is_one(empty: World) -> None:
    empty.join("p0")

    assert empty.submit().handoff == []
    empty.report("p0", stranded=["r"])
    assert empty.sent(HandOff) == []

    empty.join("d0")
    empty.requests.requests[R].placed_at = -1e9  # the loop's clock may have just begun
    empty.report("p0", stranded=["r"])
    assert empty.sent(HandOff) == [("p0", HandOff(R, "d0"))]


@pytest.mark.parametrize(("max_tokens", "leaves"), [(0, False), (1, False), (2, True), (None, True)])
async def test_a_request_of_one_token_reserves_no_hand_off(
    world: World, max_tokens: int | None, leaves: bool
) -> None:
    world.requests.submit("r", [b"payload"], NewRequest(20), max_tokens=max_tokens)

    [(_, add)] = world.sent(AddRequest)
    assert add.handoff == (["d0", "d1"] if leaves else None)
    expected = world.frontend.instances.loads.projected("d0").expected_blocks
    assert expected == (2 if leaves else 0)


async def test_a_request_that_is_recomputed_for_its_last_token_reserves_no_hand_off(world: World) -> None:
    world.requests.submit("r", [b"payload"], NewRequest(20), max_tokens=3)
    world.tokens("p0", 0, 0, 10)
    world.tokens("p0", 0, 1, 11)

    world.leave("p0")

    _, again = world.sent(AddRequest)[-1]
    assert (again.output_token_ids, again.handoff) == ([10, 11], None)


async def test_without_an_instance_that_starts_requests_submit_raises(empty: World) -> None:
    """And nothing of the request is left behind."""
    empty.join("d0")
    empty.report("d0", draining=True)

    with pytest.raises(EngineDeadError, match="no live instance takes new requests"):
        empty.submit()

    assert (empty.frontend.num_live, empty.frontend.num_waiting) == (0, 0)
    assert empty.requests.requests == {}


# ---- requests that wait for room


async def test_a_request_that_no_neutral_instance_has_room_for_waits(
    empty: World,
) -> None:
    empty.join("n0", "n1")
    for name in ("n0", "n1"):
        empty.report(name, free=1, running=1)
    for name in ("r", "s"):
        empty.requests.submit(name, [b"payload"], NewRequest(32))

    assert empty.sent(AddRequest) == []
    assert empty.frontend.snapshot().waiting_line == WaitingRequests(2, 64)
    assert empty.frontend.report().waiting == Demand(2, 64)
    assert empty.frontend.num_waiting == 2

    empty.report("n1", free=2, running=1)

    assert [(peer, add.request_id) for peer, add in empty.sent(AddRequest)] == [("n1", "r")]
    assert empty.frontend.snapshot().waiting_line == WaitingRequests(1, 32)
    empty.requests.abort(["s"])
    assert empty.frontend.snapshot().waiting_line == WaitingRequests(0, 0)
    assert empty.frontend.num_waiting == 1


async def test_an_instance_that_is_out_of_reach_from_its_first_report_on_gets_no_waiting_request(
    empty: World,
) -> None:
    empty.join("n0")
    empty.report("n0", free=1, running=1)
    empty.requests.submit("r", [b"payload"], NewRequest(32))
    empty.members.append("n1")
    empty.tell_members()

    load = InstanceLoad("n1", "neutral", total_blocks=100, free_blocks=100)
    empty.wire.hear("n1", LoadReport(load, [], request_reports=UNHEARD_REPORTS))

    assert empty.wire.failures.problems() == []
    assert empty.sent(AddRequest) == []


# ---- stranded requests


async def test_a_stranded_request_is_placed_when_a_decode_instance_has_room(
    empty: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 prompt tokens and one more: two blocks, and one to grow."""
    monkeypatch.setattr(placement, "HANDOFF_RETRY_S", 1e6)
    empty.join("p0", "d0")
    empty.submit(prompt_tokens=20)
    empty.requests.requests[R].placed_at = -1e9  # the loop's clock may have just begun
    empty.end_migration("p0", "d0", False, "full")
    for free in (0, 2):
        empty.report("d0", free=free)
        empty.report("p0", stranded=["r"])
        assert empty.sent(HandOff) == []

    empty.report("d0", free=3)
    empty.report("p0", stranded=["r"])
    assert empty.sent(HandOff) == [("p0", HandOff(R, "d0"))]

    empty.report("p0", stranded=["r"])  # it has just been asked
    assert len(empty.sent(HandOff)) == 1


async def test_two_stranded_requests_do_not_get_the_same_free_blocks(empty: World) -> None:
    empty.join("p0", "d0")
    for name in ("r", "s"):
        empty.submit(name, prompt_tokens=20)
        empty.wire.hear("p0", ended(name, "p0", "d0", False, "full"))
    empty.report("d0", free=4)

    empty.report("p0", stranded=["r", "s"])

    assert [message.request_id for _, message in empty.sent(HandOff)] == ["r"]


async def test_a_stranded_request_that_has_another_owner_or_has_ended_is_not_handed_off(world: World) -> None:
    world.submit()
    world.tokens("d0", 1, 0, 10)

    world.report("p0", stranded=["r", "unknown"])

    assert world.sent(HandOff) == []


# ---- predicted first tokens


async def test_a_deadline_passes_what_waits_behind_it(world: World) -> None:
    """p0 and p1 have 1,000 tokens each; the request goes before all that have no target, or a later one."""
    for name in ("p0", "p1"):
        world.report(name, prompt_token_s=0.001)
    new = NewRequest(100, slo=Slo(1.0), arrives_later_s=-Slo(1.0).lead_s)
    world.submit("a", 1000)
    world.submit("b", 1000)

    assert world.frontend.first_token_s(NewRequest(100), 0) == pytest.approx(1.1)
    assert world.frontend.first_token_s(new, 0) == pytest.approx(0.1)
    assert world.frontend.first_token_s(new, 400) == pytest.approx(0.3)
    urgent = NewRequest(1000, slo=Slo(0.5), arrives_later_s=-Slo(0.5).lead_s)
    for name in ("c", "d"):
        world.requests.submit(name, [b"payload"], urgent)
    assert world.frontend.first_token_s(new, 0) == pytest.approx(1.1)


async def test_a_request_with_a_first_token_waits_no_more(world: World) -> None:
    world.report("p1", prompt_token_s=0.001)
    world.report("p0", prompt_token_s=0.001)
    world.submit("r", 1000)  # on p0
    world.submit("s", 1000)  # on p1
    new = NewRequest(100, slo=Slo(1.0), arrives_later_s=-Slo(1.0).lead_s)
    assert world.frontend.first_token_s(new, 0) == pytest.approx(0.1)

    world.tokens("p0", 0, 0, 10)
    world.requests.abort(["s"])

    # The reports of the instances do not say so yet.
    assert world.frontend.first_token_s(new, 0) == pytest.approx(1.1)
    assert world.frontend.num_waiting == 0


async def test_what_waits_for_memory_predicts_how_long_the_next_one_does(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No prompt is to be computed on p0 and p1, but requests have been waiting there for a minute."""
    now = world.frontend._placement.now
    for name in ("a", "b"):
        world.submit(name, 100)
    for name in ("p0", "p1"):
        world.report(name, prompt_token_s=0.001, requests_added=1)
    monkeypatch.setattr(placement.RequestPlacement, "now", property(lambda _: now + 60.0))

    assert world.frontend.first_token_s(NewRequest(100), 0) == pytest.approx(60.0, abs=1.0)
    assert world.frontend.first_token_s(NewRequest(50), 0) == pytest.approx(0.05)
    assert world.frontend.first_token_s(NewRequest(100, -1), 0) == pytest.approx(0.1)
