"""Requests whose instance has died wait, bounded, for another one."""

import asyncio

from vllm.v1.engine import FinishReason

from pd_serve.comm.messages import AddRequest
from pd_serve.comm.timing import DEATH_CHAIN_S, RECOVERY_S
from router.request import NewRequest
from tests.unit.pd_serve.frontend.frontend_world import R, World
from tests.virtual_time import in_virtual_time


def last_add(world: World) -> tuple[str, AddRequest]:
    return world.sent(AddRequest)[-1]


@in_virtual_time
async def test_a_decode_instance_recomputes_what_the_only_prefill_instance_had() -> None:
    world = World()
    world.join("p0", "d0")
    world.submit("r")
    world.submit("s")
    world.tokens("p0", 0, 0, 10, of="s")

    world.leave("p0")

    again = [(peer, add.request_id, add.output_token_ids) for peer, add in world.sent(AddRequest)[2:]]
    assert again == [("d0", "r", []), ("d0", "s", [10])]
    assert [add.handoff for _, add in world.sent(AddRequest)[2:]] == [None, None]
    await world.frontend.close()


@in_virtual_time
async def test_without_any_instance_a_lost_request_waits_for_the_next_one() -> None:
    world = World()
    world.join("n0")
    world.submit()
    world.tokens("n0", 0, 0, 10)

    world.leave("n0")
    await asyncio.sleep(RECOVERY_S / 2)
    assert world.delivered_tokens() == [10]
    world.join("n1")
    await asyncio.sleep(1.0)

    peer, again = last_add(world)
    assert (peer, again.output_token_ids) == ("n1", [10])
    world.tokens("n1", again.epoch, 1, 11, finish=FinishReason.STOP)
    assert world.delivered_tokens() == [11]
    await world.frontend.close()


@in_virtual_time
async def test_a_lost_request_that_finds_no_instance_in_time_ends_with_an_error() -> None:
    world = World()
    world.join("p0", "d0")
    world.report("d0", draining=True)
    world.submit()

    world.leave("p0")
    assert world.delivered() == []
    await asyncio.sleep(RECOVERY_S + 1.0)

    assert [(o.request_id, o.finish_reason) for o in world.delivered()] == [("r", FinishReason.ERROR)]
    assert (world.frontend.num_waiting, len(world.requests.requests)) == (0, 0)
    await world.frontend.close()


@in_virtual_time
async def test_requests_in_the_line_wait_for_the_next_instance_too() -> None:
    world = World()
    world.join("n0")
    world.report("n0", free=1, running=1)
    world.requests.submit("r", [b"payload"], NewRequest(32))
    world.requests.submit("s", [b"payload"], NewRequest(64))
    assert world.sent(AddRequest) == []

    world.leave("n0")
    await asyncio.sleep(10.0)
    world.join("n1")
    world.report("n1", free=3, running=1)
    await asyncio.sleep(1.0)

    assert [(peer, add.request_id, add.epoch) for peer, add in world.sent(AddRequest)] == [("n1", R, 0)]
    assert world.frontend.snapshot().waiting_line.requests == 1, "late binding goes on"
    world.requests.abort(["r", "s"])
    assert world.frontend.num_waiting == 0
    await world.frontend.close()


@in_virtual_time
async def test_an_aborted_request_is_not_recomputed() -> None:
    world = World()
    world.join("n0")
    world.submit()
    world.leave("n0")

    world.requests.abort(["r"])
    world.join("n1")
    await asyncio.sleep(1.0)

    assert len(world.sent(AddRequest)) == 1
    await world.frontend.close()


@in_virtual_time
async def test_deaths_in_quick_succession_cost_a_pause() -> None:
    """Six of eight instances die a few ms apart: longer chains than a request may see deaths."""
    world = World()
    world.join(*(f"n{number}" for number in range(8)))
    for number in range(16):
        world.submit(f"r{number}")
    for number in range(6):
        world.leave(f"n{number}")
        await asyncio.sleep(0.005)
    await asyncio.sleep(2 * DEATH_CHAIN_S)

    assert world.delivered() == []
    owners = {add.request_id: peer for peer, add in world.sent(AddRequest)}
    assert set(owners.values()) == {"n6", "n7"}
    await world.frontend.close()
