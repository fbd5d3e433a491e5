"""The link of an API server to the manager."""

import asyncio

from pd_serve.comm.membership import ApiServerInfo, Join, MembershipView
from pd_serve.comm.requests import Call
from pd_serve.comm.rpc import RpcClient
from pd_serve.comm.timing import MANAGER_LEASE_S
from pd_serve.frontend.manager_client import ManagerClient
from router.request import NO_DEMAND
from tests.recording_wire import RecordingWire
from tests.virtual_time import in_virtual_time


@in_virtual_time
async def test_an_api_server_joins_after_any_failure_to_find_the_manager() -> None:
    """Serve raises errors of its own, and an API server that stops to join loses its requests."""
    failures = [RuntimeError("no replica"), KeyError("x")]

    async def find_manager() -> str:
        if failures:
            raise failures.pop()
        return "tcp://manager"

    wire = RecordingWire("api")
    client = ManagerClient(
        wire,
        MembershipView("api", wire),
        RpcClient(wire, Call),
        find_manager,
        lambda: NO_DEMAND,
        lambda instance_id: True,
    )
    client.open(ApiServerInfo("tcp://api", "tcp://api/tokens"))
    await asyncio.sleep(3 * MANAGER_LEASE_S)
    assert wire.sent_to(Join, "manager")
    await client.close()
