"""The membership goes to every process, and API servers without a heartbeat are removed."""

import asyncio

from pd_serve.comm.cluster_state import ClusterState
from pd_serve.comm.membership import Membership
from pd_serve.comm.timing import API_SERVER_LEASE_S, HEARTBEAT_S
from tests.unit.pd_serve.manager.manager_world import World, a_world
from tests.virtual_time import in_virtual_time


def last_membership(world: World, to: str) -> Membership:
    return world.sent(Membership, to)[-1]


@in_virtual_time
async def test_instances_scheduler_and_api_servers_get_the_same_membership() -> None:
    async with a_world() as world:
        members = last_membership(world, "api")
        assert [info.instance_id for info in members.instances] == ["prefill-0", "decode-0", "decode-1"]
        assert members.api_servers["api"].token_endpoint == "tcp://api/tokens"
        for peer in ("scheduler", "prefill-0", "decode-0", "decode-1"):
            assert last_membership(world, peer) == members
        assert world.sent(ClusterState, "api")
        assert not world.sent(ClusterState, "decode-0")


@in_virtual_time
async def test_the_membership_is_repeated_as_a_heartbeat() -> None:
    async with a_world() as world:
        before = len(world.sent(Membership, "decode-0"))
        await asyncio.sleep(5.5 * HEARTBEAT_S)
        assert len(world.sent(Membership, "decode-0")) in (before + 5, before + 6)


@in_virtual_time
async def test_a_change_of_the_membership_is_sent_at_once() -> None:
    async with a_world() as world:
        world.launcher.on_lost("decode-0")
        await asyncio.sleep(0.01)
        names = [info.instance_id for info in last_membership(world, "api").instances]
        assert names == ["prefill-0", "decode-1"]


@in_virtual_time
async def test_a_leaving_instance_counts_as_used_until_every_api_server_reports_it_unused() -> None:
    async with a_world() as world:
        world.joined.append("other")
        world.busy.add("decode-0")
        world.drain_by_scheduler("decode-0")
        world.want_stopped("decode-0")
        await asyncio.sleep(2 * HEARTBEAT_S)
        assert world.manager.announcer.is_used("decode-0")
        assert not world.launcher.stopped
        world.busy.clear()
        await asyncio.sleep(0.5)
        assert world.launcher.stopped == ["decode-0"]


@in_virtual_time
async def test_an_api_server_whose_lease_expired_is_removed_and_uses_no_instance() -> None:
    async with a_world() as world:
        world.joined.append("other")
        await asyncio.sleep(1)
        assert list(world.manager.announcer.api_servers) == ["api", "other"]
        silent: list[str] = []
        world.manager.announcer.on_silent = silent.append
        world.joined.remove("other")
        await asyncio.sleep(API_SERVER_LEASE_S + 2 * HEARTBEAT_S)
        assert list(world.manager.announcer.api_servers) == ["api"]
        assert list(last_membership(world, "decode-0").api_servers) == ["api"]
        assert silent == ["other"]


@in_virtual_time
async def test_an_api_server_whose_process_has_ended_leaves_at_once_and_for_ever() -> None:
    """A message that it has sent before its end, and that arrives after it, does not bring it back."""
    async with a_world() as world:
        world.joined.append("other")
        await asyncio.sleep(1)
        world.manager.announcer.drop_ended("other")
        world.manager.announcer.drop_ended("never joined")
        await asyncio.sleep(0.01)
        assert list(last_membership(world, "decode-0").api_servers) == ["api"]
        await asyncio.sleep(3 * HEARTBEAT_S)  # it still sends heartbeats here
        assert list(last_membership(world, "decode-0").api_servers) == ["api"]


@in_virtual_time
async def test_an_api_server_learns_that_it_was_dropped_meanwhile() -> None:
    """Its heartbeats did not arrive for a while, and so the instances have ended its requests."""
    async with a_world() as world:
        first = last_membership(world, "decode-0").api_servers["api"]
        await asyncio.sleep(5 * HEARTBEAT_S)
        assert last_membership(world, "decode-0").api_servers["api"] == first
        world.joined.clear()
        await asyncio.sleep(API_SERVER_LEASE_S + 2 * HEARTBEAT_S)
        world.joined.append("api")
        await asyncio.sleep(1)
        again = last_membership(world, "api").api_servers["api"]
        assert again.address == first.address
        assert again.joined not in ("", first.joined)
