"""An instance that reports its prefix cache, and API servers that follow it over links that lose messages."""

import asyncio
from collections.abc import Callable, Set
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec

from migration.cached_keys import ChangeRecord, KeyChanges, KeyFormat
from pd_serve.comm.cached_blocks import CachedBlocks, FollowCachedBlocks
from pd_serve.comm.membership import MembershipView
from pd_serve.comm.messages import ToApiServer
from pd_serve.comm.timing import INSTANCE_HEARTBEAT_S
from pd_serve.frontend.cached_blocks import CachedBlockFollower
from pd_serve.instance.cached_blocks import CachedBlockReporter
from router.prefix_index import PrefixIndex
from tests.members import instance_info, membership
from tests.recording_wire import RecordingWire

FORMAT = KeyFormat("simulated", 16, 16)
NAME = "d0"


class Cache:
    """A prefix cache; a `CachedKeySource`."""

    def __init__(self) -> None:
        self.keys: set[int] = set()
        self.record: ChangeRecord[int] = ChangeRecord()

    def gain(self, *keys: int) -> None:
        for key in keys:
            self.keys.add(key)
            self.record.gained(key)

    def lose(self, *keys: int) -> None:
        for key in keys:
            self.keys.remove(key)
            self.record.lost(key)

    def empty(self) -> None:
        self.keys.clear()
        self.record.restart(())

    async def take(self, most: int) -> KeyChanges | None:
        return KeyChanges(*self.record.take(most)) if self.record or self.record.is_new else None


class Instance:
    """The reports of an instance, with its heartbeats.

    Attributes:
        deliver: Called with each message to an API server.
    """

    def __init__(self, address: str = f"tcp://{NAME}") -> None:
        self.address = address
        self.cache = Cache()
        self.wire = RecordingWire(NAME)
        self.members = MembershipView(NAME, self.wire)
        self.deliver: Callable[[str, CachedBlocks], None] = lambda name, message: None
        self.heartbeat: Callable[[int], None] = lambda number: None
        self.reporter = CachedBlockReporter(self, self.members)  # type: ignore[arg-type]
        self.reporter.start(SimpleNamespace(cached_keys=self.cache), address)  # type: ignore[arg-type]
        self.tasks = [asyncio.ensure_future(self.reporter.run()), asyncio.ensure_future(self._heartbeats())]

    def send(self, peer: str, message: CachedBlocks) -> bool:
        """As the wire of the reporter."""
        encoded = msgspec.msgpack.encode(message)
        self.deliver(peer, msgspec.msgpack.decode(encoded, type=ToApiServer))
        return True

    def close(self) -> None:
        for task in self.tasks:
            task.cancel()

    async def _heartbeats(self) -> None:
        while True:
            await asyncio.sleep(INSTANCE_HEARTBEAT_S)
            self.reporter.report_soon()
            self.heartbeat(self.reporter.number)


class ApiServer:
    """Follows the instance.

    Attributes:
        loses: Whether a message is lost, by its kind and content.
        received: Reports that have arrived.
    """

    def __init__(self, name: str, instance: Instance) -> None:
        self.name = name
        self.instance = instance
        self.wire = RecordingWire(name)
        self.members = MembershipView(name, self.wire)
        self.index = PrefixIndex(asyncio.get_running_loop().time)
        self.index.is_used = True
        self.follower = CachedBlockFollower(self, self.members, self.index)  # type: ignore[arg-type]
        self.loses: Callable[[Any], bool] = lambda message: False
        self.received: list[CachedBlocks] = []
        self.join(instance)

    def join(self, instance: Instance) -> None:
        """The instance is a member."""
        self.instance = instance
        info = instance_info(NAME)
        engine = replace(info.engine, key_format=FORMAT, num_blocks=1_000_000)
        told = membership(NAME, api_servers=[self.name])
        told.instances[:] = [replace(info, address=instance.address, engine=engine)]
        change = self.members.update(told)
        assert change is not None
        for left in change.left:
            self.follower.remove(left)

    def send(self, peer: str, message: FollowCachedBlocks) -> bool:
        """As the wire of the follower."""
        if not self.loses(message):
            self.instance.reporter.on_asked(self.name)
        return True

    def hear(self, message: CachedBlocks) -> None:
        if not self.loses(message):
            self.received.append(message)
            self.follower.on_report(NAME, message)


class World:
    """An instance, and API servers that follow it."""

    def __init__(self, *names: str) -> None:
        self.instance = Instance()
        self.api_servers = {name: ApiServer(name, self.instance) for name in names}
        self._connect(self.instance)

    def _connect(self, instance: Instance) -> None:
        instance.members.update(membership(NAME, api_servers=list(self.api_servers)))
        instance.deliver = lambda name, message: self.api_servers[name].hear(message)
        instance.heartbeat = self._on_heartbeat

    def _on_heartbeat(self, number: int) -> None:
        for api_server in self.api_servers.values():
            api_server.follower.on_load(NAME, number)

    def restart_instance(self) -> Instance:
        """Another instance has the name. Returns the former one."""
        former = self.instance
        former.close()
        self.instance = Instance(f"{former.address}/next")
        self._connect(self.instance)
        for api_server in self.api_servers.values():
            api_server.join(self.instance)
        return former

    def add(self, name: str) -> ApiServer:
        """Another API server comes."""
        self.api_servers[name] = api_server = ApiServer(name, self.instance)
        self._connect(self.instance)
        return api_server

    def known_to(self, name: str) -> Set[int]:
        return self.api_servers[name].index.keys(NAME)

    def close(self) -> None:
        self.instance.close()
