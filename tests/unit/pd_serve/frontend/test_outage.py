"""While no instance takes requests, new ones wait for those that are started, and are refused otherwise."""

import asyncio
from collections.abc import Callable

import pytest
from vllm.v1.engine import FinishReason

from pd_serve.comm.cluster_state import ClusterState, RestartState, SchedulerState, StartingInstance
from pd_serve.comm.membership import MANAGER, ApiServerStatus
from pd_serve.comm.messages import AddRequest
from pd_serve.comm.timing import INSTANCE_LEASE_S, RECOVERY_S, REQUEST_REPORT_INTERVAL_S
from pd_serve.errors import EngineDeadError
from pd_serve.frontend.outage import Outage
from router.request import NewRequest
from tests.manual_clock import ManualClock
from tests.members import membership
from tests.unit.pd_serve.frontend.frontend_world import World
from tests.virtual_time import in_virtual_time


def state(*, wanted: int = 0, replaces: bool = True, starting: bool = False) -> ClusterState:
    rows = [StartingInstance("neutral-1", "neutral", "to be started")] if starting else []
    scheduler, restart = SchedulerState("alive", "llumnix", 1, 0), RestartState(False, "")
    return ClusterState(
        rows, scheduler, [], [], restart, wanted={"prefill": 0, "neutral": wanted}, replaces=replaces
    )


@pytest.mark.parametrize(
    ("told", "instances", "takes"),
    [
        (None, 0, False),
        (state(wanted=1), 0, True),
        (state(wanted=1), 1, False),  # it drains, and nothing is missing
        (state(wanted=2), 1, True),
        (state(wanted=1, replaces=False), 0, False),
        (state(wanted=1, replaces=False, starting=True), 0, True),
    ],
)
def test_requests_wait_while_instances_are_missing_or_started(
    told: ClusterState | None, instances: int, takes: bool
) -> None:
    outage = Outage(lambda: False, lambda: instances, lambda: told, lambda: 0.0, ManualClock())

    assert outage.takes_requests() is takes


def test_an_outage_ends_with_the_first_instance_and_the_next_one_has_its_own_time() -> None:
    serving, clock = True, ManualClock()
    outage = Outage(lambda: serving, lambda: 0, lambda: state(wanted=1), lambda: 0.0, clock)

    assert outage.takes_requests()
    serving = False
    outage.look()
    clock.now += RECOVERY_S - 1
    assert outage.takes_requests()
    clock.now += 1
    assert not outage.takes_requests()
    serving = True
    outage.look()
    serving = False
    assert outage.takes_requests()


async def hear(tell: Callable[[], None], seconds: float) -> None:
    """Only this process sends something, each second."""
    for _ in range(round(seconds)):
        await asyncio.sleep(1.0)
        tell()


def without_instances() -> World:
    """The only instance has just died, and is to be replaced."""
    world = World()
    world.join("n0")
    world.wire.hear(MANAGER, state(wanted=1))
    world.leave("n0")
    return world


@in_virtual_time
async def test_a_new_request_waits_for_the_instance_that_is_started() -> None:
    world = without_instances()

    world.requests.submit("r", [b"payload"], NewRequest(20))
    assert (world.sent(AddRequest), world.frontend.num_waiting) == ([], 1)
    await asyncio.sleep(RECOVERY_S / 2)
    world.join("n1")
    await asyncio.sleep(1.0)

    [(peer, add)] = world.sent(AddRequest)
    assert (peer, add.request_id, add.epoch, add.output_token_ids) == ("n1", "r", 0, [])
    world.tokens("n1", 0, 0, 10, finish=FinishReason.STOP)
    assert world.delivered_tokens() == [10]
    assert (world.frontend.num_waiting, world.requests.requests) == (0, {})
    await world.frontend.close()


@in_virtual_time
async def test_an_instance_that_is_to_be_stopped_is_in_the_place_of_no_dead_one() -> None:
    """The membership without the dead one comes before the state with the start."""
    world = World()
    world.join("n0", "n1")
    world.wire.hear(MANAGER, state(wanted=1))
    world.members = ["n1"]
    world.wire.hear(MANAGER, membership("n1", api_servers=["api"], leaving=["n1"]))
    world.report("n1", draining=True)

    assert world.frontend.num_live == 0
    assert world.frontend.takes_requests
    await world.frontend.close()


@in_virtual_time
async def test_a_waiting_request_can_be_aborted() -> None:
    world = without_instances()
    world.requests.submit("r", [b"payload"], NewRequest(20))

    world.requests.abort(["r"])
    world.join("n1")
    await asyncio.sleep(1.0)

    assert (world.sent(AddRequest), world.frontend.num_waiting, world.requests.requests) == ([], 0, {})
    await world.frontend.close()


@in_virtual_time
async def test_after_two_minutes_who_waits_gets_an_error_and_who_comes_is_refused() -> None:
    world = without_instances()
    refused: list[str] = []
    world.requests.unavailable = lambda request_id, why: refused.append(request_id)
    await asyncio.sleep(REQUEST_REPORT_INTERVAL_S)  # it is noted without a request
    world.requests.submit("r", [b"payload"], NewRequest(20))
    assert world.frontend.takes_requests

    await asyncio.sleep(RECOVERY_S + 1.0)

    assert refused == ["r"]
    assert not world.frontend.takes_requests
    with pytest.raises(EngineDeadError, match="no live instance takes new requests"):
        world.requests.submit("s", [b"payload"], NewRequest(20))
    assert world.requests.requests == {}
    await world.frontend.close()


@in_virtual_time
async def test_requests_of_an_api_server_that_hears_none_end_after_two_minutes() -> None:
    """It is cut off with another API server, which it hears."""
    world = World()
    world.join("n0")
    refused: list[str] = []
    world.requests.unavailable = lambda request_id, why: refused.append(request_id)
    world.submit("r")
    world.submit("s")
    world.tokens("n0", 0, 0, 10)

    def other() -> None:
        world.wire.hear("api-2", ApiServerStatus(requests=1))

    await hear(other, INSTANCE_LEASE_S + 1)
    assert world.frontend.num_live == 0
    assert world.frontend.takes_requests
    assert world.requests.requests.keys() == {"r", "s"}
    await hear(other, RECOVERY_S - INSTANCE_LEASE_S)

    assert [output.finish_reason for output in world.delivered()] == [None, FinishReason.ERROR]
    assert refused == ["s"]
    assert world.requests.requests == {}
    assert not world.frontend.takes_requests
    world.report("n0")
    assert world.frontend.num_live == 1
    assert world.frontend.takes_requests
    await world.frontend.close()


@in_virtual_time
async def test_requests_of_an_api_server_that_hears_the_manager_only_end_in_a_bounded_time() -> None:
    """Its instances live, and none is missing. One request runs, one waits for room, one comes later."""
    world = World()
    world.join("n0")
    world.report("n0", free=2, running=1)
    refused: list[str] = []
    world.requests.unavailable = lambda request_id, why: refused.append(request_id)
    world.submit("r")
    world.tokens("n0", 0, 0, 10)
    world.requests.submit("s", [b"payload"], NewRequest(90))
    assert world.frontend.snapshot().waiting_line.requests == 1
    world.wire.hear(MANAGER, state(wanted=1))

    await hear(world.tell_members, INSTANCE_LEASE_S + 2)
    assert world.frontend.num_live == 0
    assert [row.state for row in world.frontend.snapshot().instances] == ["unreachable"]
    assert world.frontend.takes_requests  # the manager may be about to replace it
    assert world.requests.requests.keys() == {"r", "s"}
    await hear(world.tell_members, RECOVERY_S + 2)

    assert not world.frontend.takes_requests
    assert world.requests.requests == {}
    assert refused == ["s"]
    assert [output.finish_reason for output in world.delivered()] == [None, FinishReason.ERROR]
    world.report("n0")
    assert world.frontend.num_live == 1
    assert world.frontend.takes_requests
    await world.frontend.close()


@in_virtual_time
async def test_requests_of_an_instance_that_is_heard_again_go_on_there() -> None:
    world = World()
    world.join("n0")
    world.submit("r")
    world.tokens("n0", 0, 0, 10)
    await hear(world.tell_members, INSTANCE_LEASE_S + 5)
    assert len(world.sent(AddRequest)) == 1

    world.report("n0")
    await asyncio.sleep(1.0)

    assert [add.output_token_ids for _, add in world.sent(AddRequest)] == [[], [10]]
    assert world.frontend.takes_requests
    await world.frontend.close()
