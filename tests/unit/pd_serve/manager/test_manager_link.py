"""Owner and API servers over fake sockets: who is there, what is asked, either of them away for a while."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from pd_serve.comm.messages import InstanceInfo
from pd_serve.errors import EngineDeadError, InvalidRequestError, MigrationRefusedError, UnknownTargetError
from pd_serve.manager.manager_link import GRACE_S, HEARTBEAT_S, LEASE_S, ManagerClient, ManagerDesk
from pd_serve.observe.cluster_reports import ClusterReports
from pd_serve.observe.timeline import ObservedMigration
from router.request import NO_DEMAND
from tests.unit.pd_serve.made_migrations import migrated
from tests.virtual_time import in_virtual_time


def info(name: str, pid: int = 1) -> InstanceInfo:
    return InstanceInfo(
        name, name.split("-")[0], f"tcp://{name}", "node", pid, None, ["generate"], 512, 100, 16
    )


class Net:
    """Carries messages between wires of one test. Those to an address that nobody has are lost."""

    def __init__(self) -> None:
        self.listeners: dict[str, Callable[[list[bytes]], None]] = {}


class FakeWire:
    def __init__(self, net: Net, name: str) -> None:
        self.net, self.name = net, name
        self.peers: dict[str, str] = {}
        self.addresses: list[str] = []

    def listen(self, on_message: Callable[[list[bytes]], None]) -> str:
        address = f"{self.name}/{len(self.net.listeners)}"
        self.net.listeners[address] = on_message
        self.addresses.append(address)
        return address

    def connect(self, peer: str, address: str) -> None:
        self.peers[peer] = address

    def disconnect(self, peer: str) -> None:
        self.peers.pop(peer, None)

    def send(self, peer: str, message: object, payload: Sequence[bytes] = ()) -> bool:
        if peer not in self.peers:
            return False
        frames = [self.name.encode(), msgspec.msgpack.encode(message)]
        if (listener := self.net.listeners.get(self.peers[peer])) is not None:
            asyncio.get_running_loop().call_soon(listener, frames)
        return True

    def decoder(self, kind: Any) -> Callable[[bytes], Any]:
        return msgspec.msgpack.Decoder(kind).decode

    def vanish(self) -> None:
        for address in self.addresses:
            self.net.listeners.pop(address)


class FakeRouter:
    """Stands for `RequestRouter`, with the requests that a test gives it."""

    num_waiting, num_live = 2, 3

    def __init__(self) -> None:
        self.reports = ClusterReports(lambda: NO_DEMAND, lambda: 0, lambda: 0.0)
        self.instances: Any = FakeInstances()
        self.left: list[str] = []
        self.busy: set[str] = set()
        self.requests: set[str] = set()

    def join(self, info: InstanceInfo) -> None:
        self.instances.infos[info.instance_id] = info

    def leave(self, instance_id: str) -> bool:
        self.left.append(instance_id)
        return self.instances.infos.pop(instance_id, None) is not None

    def load_of(self, instance_id: str) -> Any:
        return SimpleNamespace(instance_id=instance_id, draining=True)

    def is_empty(self, instance_id: str) -> bool:
        return instance_id not in self.busy

    def snapshot(self) -> dict[str, Any]:
        return {"instances": [{"id": name} for name in self.instances.infos]}

    async def migrate(self, request_id: str, destination: str) -> ObservedMigration:
        if request_id not in self.requests:
            raise UnknownTargetError(f"no running request {request_id!r}")
        return ObservedMigration(migrated(stages=2, blocks=4, tokens=120), 0.0, downtime_s=0.0085)

    def find_requests(self, name: str) -> list[dict[str, Any]]:
        return [{"name": name, "outcome": None}] if name in self.requests else []


class FakeInstances:
    def __init__(self) -> None:
        self.infos: dict[str, InstanceInfo] = {}
        self.scheduler = ""

    def __iter__(self) -> Any:
        return iter(self.infos.values())

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def introduce_scheduler(self, name: str, address: str) -> None:
        self.scheduler = address


class FakeFleet:
    """Stands for `Fleet`: refuses what a test wants refused."""

    def __init__(self) -> None:
        self.leaving: set[str] = set()
        self.asked: list[Any] = []
        self.refusal: Exception | None = None

    def state(self) -> dict[str, Any]:
        coming = [{"id": "decode-9", "role": "decode", "state": "waiting for resources: 1 GPU"}]
        return {"coming": coming, "scheduler": {"state": "alive", "restarts": 2}} | {
            "restart": {"running": True},
            "scaled": [],
        }

    def drain(self, instance_id: str, *, draining: bool, stop: bool) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append((instance_id, draining, stop))

    def scale(self, sizes: dict[str, int]) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(sizes)

    def restart(self) -> None:
        self.asked.append("restart")


class World:
    """One owner with two instances, and two API servers."""

    def __init__(self) -> None:
        self.net = Net()
        self.links: list[ManagerClient] = []
        self.routers: list[FakeRouter] = []
        self.infos = {name: info(name) for name in ("prefill-0", "decode-0")}
        self.owner: ManagerDesk | None = None
        self.new_owner()

    def new_owner(self, *, took_over: bool = False) -> None:
        self.wire = FakeWire(self.net, "owner")
        self.fleet = FakeFleet()
        self.owner = ManagerDesk(self.wire)  # type: ignore[arg-type]
        roster: Any = SimpleNamespace(instances=self)
        self.owner.open(roster, self.fleet, took_over=took_over)  # type: ignore[arg-type]
        self.owner.scheduler_at("tcp://scheduler")

    def __iter__(self) -> Any:
        return iter(self.infos.values())

    async def lose_owner(self) -> None:
        assert self.owner is not None
        await self.owner.close()
        self.wire.vanish()
        self.owner = None

    async def find_manager(self) -> str:
        if self.owner is None:
            raise EngineDeadError("no owner")
        return self.owner.address

    def new_server(self) -> None:
        link = ManagerClient(FakeWire(self.net, f"api-{len(self.links)}"), self.find_manager)  # type: ignore[arg-type]
        router = FakeRouter()
        link.attach(router)  # type: ignore[arg-type]
        self.links.append(link)
        self.routers.append(router)

    async def close(self) -> None:
        for link in self.links:
            await link.close()
        if self.owner is not None:
            await self.owner.close()


@asynccontextmanager
async def a_world() -> AsyncIterator[World]:
    world = World()
    try:
        world.new_server()
        world.new_server()
        await asyncio.sleep(2 * HEARTBEAT_S)
        yield world
    finally:
        await world.close()


@in_virtual_time
async def test_every_server_hears_who_is_there() -> None:
    async with a_world() as world:
        for router in world.routers:
            assert list(router.instances.infos) == ["prefill-0", "decode-0"]
            assert router.instances.scheduler == "tcp://scheduler"
        del world.infos["decode-0"]
        world.infos["decode-1"] = info("decode-1")
        assert world.owner is not None
        world.owner.changed()
        await asyncio.sleep(0.01)
        for router in world.routers:
            assert list(router.instances.infos) == ["prefill-0", "decode-1"]
        snapshot = world.links[0].snapshot()
        assert snapshot["instances"][-1]["state"] == "waiting for resources: 1 GPU"
        assert (snapshot["owner"], snapshot["api_servers"]) == ("alive", ["api-0", "api-1"])


@in_virtual_time
async def test_one_that_is_there_anew_has_been_away() -> None:
    async with a_world() as world:
        world.infos["decode-0"] = info("decode-0", pid=2)
        await asyncio.sleep(2 * HEARTBEAT_S)
        assert [router.left for router in world.routers] == [["decode-0"]] * 2
        assert world.routers[0].instances.infos["decode-0"].pid == 2


@in_virtual_time
async def test_what_leaves_is_claimed_until_every_server_is_done_with_it() -> None:
    async with a_world() as world:
        assert world.owner is not None
        world.routers[1].busy.add("decode-0")
        world.fleet.leaving.add("decode-0")
        world.owner.changed()
        await asyncio.sleep(2 * HEARTBEAT_S)
        assert world.owner.is_claimed("decode-0")
        world.routers[1].busy.clear()
        await asyncio.sleep(0.2)
        assert not world.owner.is_claimed("decode-0")


@in_virtual_time
async def test_a_server_that_is_gone_claims_nothing() -> None:
    async with a_world() as world:
        assert world.owner is not None
        world.routers[1].busy.add("decode-0")
        world.fleet.leaving.add("decode-0")
        await asyncio.sleep(2 * HEARTBEAT_S)
        await world.links[1].close()
        await asyncio.sleep(LEASE_S + 2 * HEARTBEAT_S)
        assert not world.owner.is_claimed("decode-0")
        assert world.links[0].snapshot()["api_servers"] == ["api-0"]


@in_virtual_time
async def test_the_owner_is_away_for_a_while() -> None:
    async with a_world() as world:
        await world.lose_owner()
        await asyncio.sleep(60)
        for link, router in zip(world.links, world.routers, strict=True):
            assert list(router.instances.infos) == ["prefill-0", "decode-0"]
            snapshot = link.snapshot()
            assert (snapshot["owner"], snapshot["scheduler"]["state"]) == ("absent", "absent")
            assert link.num_live == 3
        world.new_owner(took_over=True)
        assert world.owner is not None
        assert world.owner.is_claimed("decode-0"), "API servers have not found it yet"
        await asyncio.sleep(GRACE_S + HEARTBEAT_S)
        assert world.links[0].snapshot()["owner"] == "alive"
        world.fleet.leaving.add("decode-0")
        await asyncio.sleep(2 * HEARTBEAT_S)
        assert not world.owner.is_claimed("decode-0")


@in_virtual_time
async def test_what_is_asked_by_hand_is_done_by_the_owner() -> None:
    async with a_world() as world:
        await world.links[0].drain("decode-0", stop=True)
        await world.links[1].scale({"decode": 3})
        await world.links[1].restart()
        assert world.fleet.asked == [("decode-0", True, True), {"decode": 3}, "restart"]


@pytest.mark.parametrize("kind", [UnknownTargetError, MigrationRefusedError, InvalidRequestError])
def test_a_refusal_keeps_its_kind(kind: type[Exception]) -> None:
    @in_virtual_time
    async def test() -> None:
        async with a_world() as world:
            world.fleet.refusal = kind("it is so")
            with pytest.raises(kind, match="it is so") as refused:
                await world.links[0].drain("decode-0")
            assert type(refused.value) is kind

    test()


@in_virtual_time
async def test_a_request_of_another_server_is_moved_there() -> None:
    async with a_world() as world:
        world.routers[1].requests.add("r")
        assert (await world.links[0].migrate("r", "decode-0")).record.tokens == 120
        with pytest.raises(UnknownTargetError, match="no running request 'x'"):
            await world.links[0].migrate("x", "decode-0")
        with pytest.raises(UnknownTargetError):
            await world.links[0].migrate("x", "decode-7")


@in_virtual_time
async def test_a_request_is_found_whichever_server_has_it() -> None:
    async with a_world() as world:
        world.routers[1].requests.add("r")
        for link in world.links:
            assert await link.find_requests("r") == [{"name": "r", "outcome": None}]
            assert await link.find_requests("x") == []
        await world.lose_owner()
        await asyncio.sleep(2 * LEASE_S)
        assert len(await world.links[1].find_requests("r")) == 1
        with pytest.raises((EngineDeadError, TimeoutError)):
            await world.links[0].find_requests("r")


@in_virtual_time
async def test_nothing_is_asked_of_an_owner_that_was_never_there() -> None:
    world = World()
    await world.lose_owner()
    world.new_server()
    await asyncio.sleep(2 * LEASE_S)
    with pytest.raises(EngineDeadError, match="owner is not there"):
        await world.links[0].drain("decode-0")
    await world.close()
