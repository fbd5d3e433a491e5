"""What the API server does where instances and its own view do not agree for a time."""

import asyncio
from collections.abc import Awaitable, Callable

from vllm.v1.engine import FinishReason

from migration.engine_interface import HeldRequest
from migration.messages import RequestId
from pd_serve.comm.messages import AbortRequests, AddRequest, LoadReport, ResendTokens
from pd_serve.comm.timing import INSTANCE_LEASE_S, REQUEST_REPORT_INTERVAL_S
from pd_serve.frontend.reconciler import (
    DEAF_REPORTS,
    MAX_MISSING_REPORTS,
    MISSING_REPORTS,
    RECOMPUTE_AT,
    UNHEARD_REPORTS,
)
from pd_serve.frontend.request_tracker import MAX_LOSSES
from pd_serve.observe.recorder import Observer
from pd_serve.observe.timeline import Timeline
from router.load import InstanceLoad
from tests.unit.pd_serve.frontend.frontend_world import R, World
from tests.virtual_time import in_virtual_time

#: Reports that suffice for any outcome of an instance that receives everything.
MANY = 3 * RECOMPUTE_AT


class Counted(Observer):
    """Numbers of reconciliations, by kind, and why requests were recomputed."""

    def __init__(self) -> None:
        self.kinds: dict[str, int] = {}
        self.reasons: list[str] = []

    def lost(self, request: Timeline, instance: str, reason: str) -> None:
        self.reasons.append(reason)

    def reconciled(self, kind: str, number: int) -> None:
        self.kinds[kind] = self.kinds.get(kind, 0) + number


class Reconciled(World):
    """A frontend with the request `r` on p0."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()
        self.frontend._recorder._observers = (self.counted,)
        self.join("p0", "p1", "d0", "d1")
        self.submit()
        assert self.requests.requests[R].ledger.owner == "p0"

    async def reports(
        self, source: str, *held: HeldRequest, times: int = MANY, heartbeat: int = 10**6
    ) -> None:
        """An instance reports the same again and again."""
        for _ in range(times):
            self.holds(source, *held, heartbeat=heartbeat)
            await asyncio.sleep(REQUEST_REPORT_INTERVAL_S)

    def resends(self) -> list[tuple[str, list[tuple[RequestId, int]]]]:
        return [(peer, message.requests) for peer, message in self.sent(ResendTokens)]

    def added(self) -> list[tuple[str, int, list[int]]]:
        """Instance, epoch and tokens of everything that was sent to be computed."""
        return [(peer, m.epoch, m.output_token_ids) for peer, m in self.sent(AddRequest)]

    def aborts(self) -> set[tuple[str, int | None]]:
        """Instances and epochs of the aborts of `r`."""
        return {(peer, m.below_epoch) for peer, m in self.sent(AbortRequests) if R in m.request_ids}


def reconciled(test: Callable[[Reconciled], Awaitable[None]]) -> Callable[[], None]:
    """Runs a test in virtual time."""

    async def run() -> None:
        world = Reconciled()
        try:
            await test(world)
        finally:
            await world.frontend.close()

    run.__name__, run.__doc__ = getattr(test, "__name__", ""), test.__doc__
    return in_virtual_time(run)


def held(epoch: int, emitted: int, *, finished: bool = False) -> HeldRequest:
    return HeldRequest(R, epoch, emitted, finished)


# ---- nothing is lost


@reconciled
async def test_views_that_agree_change_nothing(world: Reconciled) -> None:
    world.tokens("p0", 0, 0, 10, 11)

    await world.reports("p0", held(0, 2))
    await world.reports("p0", held(0, 1))

    assert (world.resends(), len(world.added()), world.aborts(), world.counted.kinds) == ([], 1, set(), {})


@reconciled
async def test_a_queued_request_waits_as_long_as_its_instance_reports_it(world: Reconciled) -> None:
    await world.reports("p0", held(0, 0), times=500)

    assert (world.resends(), len(world.added())) == ([], 1)


@reconciled
async def test_reports_before_the_request_was_sent_do_not_count(world: Reconciled) -> None:
    """They were queued in an API server that had been suspended."""
    for _ in range(MAX_MISSING_REPORTS - 1):
        world.holds("p0", heartbeat=0)
    await world.reports("p0", times=MISSING_REPORTS + 1, heartbeat=0)
    await world.reports("p0", held(0, 0))

    assert len(world.added()) == 1


@reconciled
async def test_tokens_that_arrive_late_are_progress(world: Reconciled) -> None:
    for index in range(MANY):
        await world.reports("p0", held(0, index + 40), times=2)
        world.tokens("p0", 0, index, 10)

    assert [asked for _, asked in world.resends()] == []


@reconciled
async def test_a_request_that_moves_is_found_at_its_destination(world: Reconciled) -> None:
    """The report of the commit is lost."""
    world.tokens("p0", 0, 0, 10)
    await world.reports("p0", held(0, 1), times=2)
    await world.reports("p0", times=MISSING_REPORTS - 1)
    for _ in range(MANY):
        world.holds("p0")
        await world.reports("d0", held(1, 1), times=1)

    assert len(world.added()) == 1
    assert world.requests.requests[R].is_on("d0")
    world.leave("d0")
    assert world.added()[1:] == [(world.requests.requests[R].ledger.owner, 1000, [10])]


@reconciled
async def test_a_request_that_its_source_has_taken_back_is_on_its_source(world: Reconciled) -> None:
    world.tokens("p0", 0, 0, 10)
    for _ in range(3):
        world.holds("p0", held(0, 1))
        await world.reports("d0", held(1, 1), times=1)
    assert world.requests.requests[R].committed_to == "d0"
    world.holds("d0")
    await world.reports("p0", held(2, 1))

    assert world.requests.requests[R].committed_to == ""
    assert (len(world.added()), world.aborts()) == (1, set())


@reconciled
async def test_a_suspended_copy_below_the_owner_is_left_alone(world: Reconciled) -> None:
    """Its source waits for the acknowledgement. An abort there would end the destination's copy."""
    world.tokens("p0", 0, 0, 10)
    world.tokens("d0", 1, 1, 11)
    for _ in range(MANY):
        world.holds("d0", held(1, 2))
        await world.reports("p0", held(0, 1), times=1)

    assert (world.aborts(), len(world.added())) == (set(), 1)


# ---- tokens are lost


@reconciled
async def test_lost_tokens_are_sent_again(world: Reconciled) -> None:
    world.tokens("p0", 0, 0, 10)
    world.tokens("p0", 0, 2, 12)  # the token at index 1 is lost
    await world.reports("p0", held(0, 3), times=4)
    assert world.resends() == [("p0", [(R, 1)])]

    world.tokens("p0", 0, 1, 11, 12)

    assert world.delivered_tokens() == [10, 11, 12]
    await world.reports("p0", held(0, 3))
    assert (len(world.resends()), len(world.added()), world.counted.kinds) == (1, 1, {"resend": 1})


@reconciled
async def test_lost_tokens_of_a_former_owner_come_from_the_present_one(world: Reconciled) -> None:
    world.tokens("p0", 0, 0, 10)
    world.tokens("d0", 1, 2, 12)  # the last token of p0 is lost
    await world.reports("d0", held(1, 3), times=4)
    assert world.resends() == [("d0", [(R, 1)])]

    world.tokens("d0", 1, 1, 11, 12)

    assert world.delivered_tokens() == [10, 11, 12]


@reconciled
async def test_a_lost_end_is_sent_again(world: Reconciled) -> None:
    world.tokens("p0", 0, 0, 10)
    await world.reports("p0", held(0, 2, finished=True), times=4)
    assert world.resends() == [("p0", [(R, 1)])]

    world.tokens("p0", 0, 1, 11, finish=FinishReason.STOP)

    assert world.delivered()[-1].finish_reason is FinishReason.STOP
    assert R not in world.requests.requests


@reconciled
async def test_what_is_not_sent_again_is_recomputed(world: Reconciled) -> None:
    """The outputs have logprobs, or the instance does not receive the order."""
    world.tokens("p0", 0, 0, 10)

    await world.reports("p0", held(0, 3))

    assert world.resends() == [("p0", [(R, 1)])] * 2
    [(_, epoch, tokens)] = world.added()[1:]
    assert (epoch, tokens) == (1000, [10])
    assert world.counted.reasons == ["tokens_lost"]
    assert ("p0", 1000) in world.aborts()
    world.tokens("p0", 0, 1, 99)  # late
    assert world.delivered_tokens() == [10]


# ---- requests are lost


@reconciled
async def test_a_request_that_never_arrived_is_recomputed(world: Reconciled) -> None:
    await world.reports("p0")

    assert [epoch for _, epoch, _ in world.added()][:2] == [0, 1000]
    assert world.counted.kinds["recompute"] >= 1
    assert set(world.counted.reasons) == {"request_lost"}


@reconciled
async def test_a_request_is_lost_where_nothing_arrives(world: Reconciled) -> None:
    """The instance is heard, and receives neither requests nor heartbeats."""
    await world.reports("p0", times=MAX_MISSING_REPORTS + 2, heartbeat=0)

    assert [epoch for _, epoch, _ in world.added()] == [0, 1000]


@reconciled
async def test_an_end_that_can_not_be_sent_again_is_recomputed(world: Reconciled) -> None:
    world.tokens("p0", 0, 0, 10)

    await world.reports("p0")

    assert world.added()[1][1:] == (1000, [10])


@reconciled
async def test_a_request_that_is_lost_again_and_again_fails(world: Reconciled) -> None:
    for _ in range((MAX_LOSSES + 2) * (MISSING_REPORTS + 1)):
        for name in ("p0", "p1", "d0", "d1"):
            world.holds(name)
        await asyncio.sleep(REQUEST_REPORT_INTERVAL_S)

    assert world.delivered()[-1].finish_reason is FinishReason.ERROR
    assert R not in world.requests.requests


# ---- aborts are lost


@reconciled
async def test_a_request_that_no_client_waits_for_is_aborted(world: Reconciled) -> None:
    world.requests.abort(["r"])
    world.wire.sent.clear()

    world.holds("d0", held(1, 5))
    world.holds("d1", held(1, 5, finished=True))

    assert world.aborts() == {("d0", None)}
    assert world.counted.kinds == {"unknown": 1}


@reconciled
async def test_a_copy_that_was_replaced_by_a_recompute_is_aborted(world: Reconciled) -> None:
    world.tokens("p0", 0, 0, 10)
    world.leave("p0")
    world.wire.sent.clear()

    world.holds("d0", held(1, 5))

    assert world.aborts() == {("d0", 1000)}


# ---- reports


@reconciled
async def test_reports_that_are_late_or_come_twice_are_ignored(world: Reconciled) -> None:
    world.tokens("p0", 0, 0, 10)
    world.holds("p0", held(0, 1), number=20)

    for number in (*range(1, 20), 20):
        world.holds("p0", held(0, 9), number=number)
        await asyncio.sleep(REQUEST_REPORT_INTERVAL_S)

    assert (world.resends(), len(world.added())) == ([], 1)


@reconciled
async def test_reports_of_instances_that_are_no_members_are_ignored(world: Reconciled) -> None:
    await world.reports("d7", held(5, 9))

    assert world.aborts() == set()
    assert world.requests.requests[R].committed_to == ""


@reconciled
async def test_tokens_from_before_the_membership_are_sent_again(world: Reconciled) -> None:
    """A request moved to an instance that this API server does not know yet."""
    world.tokens("p0", 0, 0, 10)
    world.tokens("d7", 1, 1, 11)
    assert world.delivered_tokens() == [10]
    world.join("d7")
    await world.reports("d7", held(1, 2), times=4)
    assert world.resends() == [("d7", [(R, 1)])]

    world.tokens("d7", 1, 1, 11)

    assert world.delivered_tokens() == [11]


# ---- instances out of reach


@reconciled
async def test_an_instance_that_only_the_manager_hears_loses_its_requests(world: Reconciled) -> None:
    world.tokens("p0", 0, 0, 10)
    for _ in range(int(INSTANCE_LEASE_S / REQUEST_REPORT_INTERVAL_S) + 3):
        for name in ("p1", "d0", "d1"):
            world.report(name)
        await asyncio.sleep(REQUEST_REPORT_INTERVAL_S)

    [(instance, epoch, tokens)] = world.added()[1:]
    assert instance != "p0"
    assert (epoch, tokens) == (1000, [10])
    assert world.counted.kinds == {"out_of_reach": 1}
    assert world.counted.reasons == ["out_of_reach"]


@reconciled
async def test_an_instance_whose_tokens_do_not_arrive_loses_its_requests(world: Reconciled) -> None:
    """Its load reports arrive, and count reports of requests that do not."""
    world.tokens("p0", 0, 0, 10)
    world.report("p0", waiting=3)
    for number in range(UNHEARD_REPORTS + 3):
        load = InstanceLoad("p0", "prefill", total_blocks=100, free_blocks=100, waiting=number)
        world.frontend._on_message("p0", load_report(load, number), ())
        await asyncio.sleep(REQUEST_REPORT_INTERVAL_S)

    assert world.added()[1][1:] == (1000, [10])
    assert world.frontend.instances.unreachable == {"p0"}
    assert "p0" not in world.frontend.instances.loads


@reconciled
async def test_an_instance_that_receives_nothing_gets_no_new_requests(world: Reconciled) -> None:
    world.tokens("p0", 0, 0, 10)
    await asyncio.sleep(10.0)  # ten heartbeats
    await world.reports("p0", held(0, 1), times=DEAF_REPORTS + 1, heartbeat=1)
    world.report("p0", waiting=7)
    assert "p0" not in world.frontend.instances.loads

    await world.reports("p0", held(0, 1), times=1)
    world.report("p0", waiting=7)

    assert world.frontend.instances.loads["p0"].waiting == 7
    assert world.frontend.instances.unreachable == set()
    assert len(world.added()) == 1


def load_report(load: InstanceLoad, request_reports: int) -> object:
    return LoadReport(load, [], None, request_reports)
