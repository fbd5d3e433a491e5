"""The register of instances: loads, roles, leases, and which instances the cluster needs."""

import asyncio

import pytest

from pd_serve.comm.leases import LeaseClock
from pd_serve.comm.timing import HEARTBEAT_S, INSTANCE_LEASE_S
from pd_serve.manager.register import InstanceRegister
from router.load import InstanceLoad
from tests.members import instance_info
from tests.virtual_time import in_virtual_time


def register(*names: str, reported: bool = True, clock: LeaseClock | None = None) -> InstanceRegister:
    made = InstanceRegister(clock or LeaseClock())
    for name in names:
        made.add(instance_info(name))
        if reported:
            made.on_report(load(name))
    return made


def load(name: str, role: str | None = None, *, draining: bool = False, **other: int) -> InstanceLoad:
    return InstanceLoad(name, role or name.split("-")[0], total_blocks=100, draining=draining, **other)


@in_virtual_time
async def test_the_role_is_that_of_the_start_until_a_report_tells_another() -> None:
    instances = register("decode-0", "prefill-0", reported=False)
    assert instances.roles() == {"decode-0": "decode", "prefill-0": "prefill"}

    instances.on_report(load("decode-0", "prefill"))

    assert instances.roles() == {"decode-0": "prefill", "prefill-0": "prefill"}


@in_virtual_time
async def test_requests_of_an_instance_are_those_that_run_and_wait_in_its_last_report() -> None:
    instances = register("decode-0", reported=False)
    assert (instances.load_of("decode-0"), instances.num_requests("decode-0")) == (None, 0)

    instances.on_report(load("decode-0", running=3, waiting=2))

    assert instances.num_requests("decode-0") == 5


@in_virtual_time
async def test_a_report_of_an_instance_that_is_not_registered_is_ignored() -> None:
    instances = register("decode-0")

    instances.on_report(load("decode-1", running=3))
    await asyncio.sleep(2 * INSTANCE_LEASE_S)

    assert "decode-1" not in instances
    assert (len(instances), instances.load_of("decode-1")) == (1, None)
    assert "decode-1" not in instances.silent()


@in_virtual_time
async def test_a_removed_instance_leaves_nothing_to_one_that_is_added_later_under_its_id() -> None:
    instances = register("decode-0")
    await asyncio.sleep(5)

    instances.remove("decode-0")
    instances.remove("decode-0")
    instances.add(instance_info("decode-0"))

    assert instances.load_of("decode-0") is None
    assert instances.age_s("decode-0") == 0


@in_virtual_time
async def test_an_instance_is_silent_once_it_has_reported_nothing_for_its_lease() -> None:
    clock = LeaseClock()
    instances = register("decode-0", "decode-1", clock=clock)
    for _ in range(round(INSTANCE_LEASE_S / HEARTBEAT_S)):
        assert instances.silent() == []
        clock.on_message()
        instances.on_report(load("decode-0"))
        await asyncio.sleep(HEARTBEAT_S)
    await asyncio.sleep(HEARTBEAT_S)
    clock.on_message()
    assert instances.silent() == ["decode-1"]

    instances.remove("decode-1")
    assert instances.silent() == []


@pytest.mark.parametrize(
    ("names", "serves"),
    [
        ([], False),
        (["prefill-0"], False),
        (["decode-0"], False),
        (["prefill-0", "decode-0"], True),
        (["neutral-0"], True),
    ],
)
@in_virtual_time
async def test_the_cluster_can_serve_if_requests_can_be_prefilled_and_decoded(
    names: list[str], serves: bool
) -> None:
    assert register(*names).can_serve() is serves


@pytest.mark.parametrize(
    ("asked", "others", "why"),
    [
        ("prefill-0", ["decode-0"], "prefill-0 is the last instance that takes new requests"),
        ("prefill-0", ["prefill-1", "decode-0"], None),
        ("prefill-0", ["neutral-0"], None),
        ("decode-0", ["prefill-0"], "decode-0 is the last decode instance"),
        ("decode-0", ["prefill-0", "decode-1"], None),
        ("decode-0", ["prefill-0", "neutral-0"], None),
        ("neutral-0", ["neutral-1"], None),
        ("neutral-0", ["decode-0"], "neutral-0 is the last instance that takes new requests"),
    ],
)
@in_virtual_time
async def test_an_instance_is_needed_if_the_cluster_could_not_serve_without_it(
    asked: str, others: list[str], why: str | None
) -> None:
    assert register(asked, *others).why_needed(asked, set()) == why


@in_virtual_time
async def test_an_instance_that_drains_or_is_to_stop_does_not_stand_in_for_another() -> None:
    instances = register("prefill-0", "prefill-1", "decode-0", "decode-1")

    assert instances.why_needed("decode-0", {"decode-1"}) == "decode-0 is the last decode instance"
    instances.on_report(load("prefill-1", draining=True))
    assert (
        instances.why_needed("prefill-0", set()) == "prefill-0 is the last instance that takes new requests"
    )


@in_virtual_time
async def test_an_instance_that_has_just_become_ready_stands_in_for_another() -> None:
    """Its first load report may be a second away: a drain was refused meanwhile."""
    instances = register("prefill-0", "decode-0")
    instances.add(instance_info("decode-1"))

    assert instances.why_needed("decode-0", set()) is None
    assert instances.why_needed("decode-0", {"decode-1"}) == "decode-0 is the last decode instance"


@in_virtual_time
async def test_instances_are_ordered_by_role_and_number() -> None:
    """Not as text, by which 10 would come before 9, nor by the time of their start."""
    instances = register("decode-10", "neutral-0", "decode-9", "prefill-1")

    assert [one.instance_id for one in instances.in_order()] == [
        "prefill-1",
        "decode-9",
        "decode-10",
        "neutral-0",
    ]
