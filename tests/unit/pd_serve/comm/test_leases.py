"""Leases that are renewed or expire, and a suspension of the process that holds them."""

import asyncio

from pd_serve.comm.leases import Leases
from pd_serve.comm.timing import HEARTBEAT_S
from tests.virtual_time import in_virtual_time

LEASE_S = 5 * HEARTBEAT_S


async def watched(leases: Leases, seconds: float, *renewed: str) -> list[str]:
    """What has expired after this time, in which these names were renewed."""
    expired: list[str] = []
    for _ in range(round(seconds / HEARTBEAT_S)):
        await asyncio.sleep(HEARTBEAT_S)
        for name in renewed:
            leases.renew(name)
        expired = leases.expired()
    return expired


@in_virtual_time
async def test_a_lease_that_is_not_renewed_stays_expired_until_it_is_dropped() -> None:
    leases = Leases(LEASE_S)
    leases.renew("a")
    leases.renew("b")

    assert await watched(leases, LEASE_S, "a") == []
    assert await watched(leases, 2 * HEARTBEAT_S, "a") == ["b"]
    leases.drop("b")
    leases.drop("never there")
    assert await watched(leases, LEASE_S, "a") == []


@in_virtual_time
async def test_the_time_in_which_this_process_was_suspended_does_not_count() -> None:
    leases = Leases(LEASE_S)
    leases.renew("a")
    await watched(leases, HEARTBEAT_S)

    await asyncio.sleep(20 * LEASE_S)

    assert leases.expired() == []
    assert await watched(leases, LEASE_S) == ["a"]
