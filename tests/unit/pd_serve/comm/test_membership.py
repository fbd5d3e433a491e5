"""One process's view of the membership, and the connections that follow it."""

import asyncio
import dataclasses

import pytest
from msgspec.structs import replace

from pd_serve.comm.membership import MANAGER, SCHEDULER, ApiServerInfo, MembershipChange, MembershipView
from tests.members import instance_info, membership
from tests.recording_wire import RecordingWire
from tests.virtual_time import in_virtual_time


def view(name: str = "p0") -> tuple[MembershipView, RecordingWire]:
    wire = RecordingWire(name)
    return MembershipView(name, wire), wire


@in_virtual_time
async def test_the_first_message_joins_all_instances_and_connects_to_all_other_members() -> None:
    members, wire = view()

    change = members.update(membership("p0", "d0", api_servers=["api"], scheduler="tcp://scheduler"))

    assert change == MembershipChange(joined=[instance_info("p0"), instance_info("d0")])
    assert wire.peers == {
        MANAGER: "tcp://manager",
        SCHEDULER: "tcp://scheduler",
        "d0": "tcp://d0",
        "api": "tcp://api",
    }
    assert (members.has_peer("d0"), members.has_peer("p0"), members.has_peer("api")) == (True, False, False)


@in_virtual_time
async def test_a_repeated_message_changes_only_the_time_of_its_arrival() -> None:
    members, _ = view()
    members.update(membership("p0", "d0", api_servers=["api"]))
    await asyncio.sleep(5)

    assert members.update(membership("p0", "d0", api_servers=["api"])) == MembershipChange()
    assert members.received_at == asyncio.get_running_loop().time()


@in_virtual_time
async def test_an_instance_that_joins_is_connected_and_one_that_leaves_is_disconnected() -> None:
    members, wire = view()
    members.update(membership("p0", "d0"))

    change = members.update(membership("p0", "d1"))

    assert change == MembershipChange(joined=[instance_info("d1")], left=["d0"])
    assert wire.peers == {MANAGER: "tcp://manager", "d1": "tcp://d1"}
    assert list(members.instances) == ["p0", "d1"]


@in_virtual_time
async def test_an_instance_of_the_same_name_at_another_address_has_left_and_joined() -> None:
    """Its process is another one, so what the earlier one had is lost."""
    members, wire = view()
    members.update(membership("p0", "d0"))
    moved = dataclasses.replace(instance_info("d0"), address="tcp://elsewhere", pid=2)
    change = members.update(replace(membership("p0"), instances=[instance_info("p0"), moved]))

    assert change == MembershipChange(joined=[moved], left=["d0"])
    assert wire.peers["d0"] == "tcp://elsewhere"


@in_virtual_time
async def test_a_message_of_an_earlier_term_is_ignored() -> None:
    members, wire = view()
    latest = membership("p0", "d0", term=2)
    members.update(latest)
    received_at, peers = members.received_at, dict(wire.peers)
    await asyncio.sleep(1)

    assert members.update(membership("p0", "d1", term=1)) is None
    assert (members.latest, members.received_at, wire.peers) == (latest, received_at, peers)


@in_virtual_time
async def test_a_later_term_replaces_the_membership_and_the_address_of_the_manager() -> None:
    members, wire = view()
    members.update(membership("p0", "d0", "d1", api_servers=["api"], term=1))

    change = members.update(replace(membership("p0", "d0", term=2), address="tcp://successor"))

    assert change is not None
    assert (change.left, list(change.api_servers_left)) == (["d1"], ["api"])
    assert wire.peers == {MANAGER: "tcp://successor", "d0": "tcp://d0"}


@pytest.mark.parametrize("again", [False, True], ids=["gone", "another process of its name"])
@in_virtual_time
async def test_an_api_server_that_has_left_is_told_with_its_earlier_token_endpoint(again: bool) -> None:
    """Instances end the requests of that endpoint."""
    members, wire = view()
    members.update(membership("p0", api_servers=["api", "other"]))
    now = {"other": ApiServerInfo("tcp://other", "tcp://other/tokens")}
    if again:
        now["api"] = ApiServerInfo("tcp://again", "tcp://again/tokens")

    change = members.update(replace(membership("p0"), api_servers=now))

    assert change == MembershipChange(
        api_servers_left={"api": ApiServerInfo("tcp://api", "tcp://api/tokens")}
    )
    assert wire.peers.get("api") == ("tcp://again" if again else None)
    assert members.api_servers == now


@in_virtual_time
async def test_the_scheduler_does_not_connect_to_itself() -> None:
    members, wire = view(SCHEDULER)

    members.update(membership("p0", scheduler="tcp://scheduler"))

    assert wire.peers == {MANAGER: "tcp://manager", "p0": "tcp://p0"}


@in_virtual_time
async def test_a_scheduler_that_is_gone_is_disconnected() -> None:
    members, wire = view()
    members.update(membership("p0", scheduler="tcp://scheduler"))
    members.update(membership("p0"))

    assert SCHEDULER not in wire.peers


@in_virtual_time
async def test_instances_on_other_machines_are_far() -> None:
    members, _ = view()
    assert not members.is_far("d0")
    message = membership("p0", "d0", "d1")
    here, near, far = message.instances
    moved = [here, near, dataclasses.replace(far, node="another")]
    members.update(replace(message, instances=moved))

    assert [members.is_far(name) for name in ("p0", "d0", "d1", "d2")] == [False, False, True, False]
