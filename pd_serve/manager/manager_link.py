"""Between the owner of the instances and the API servers: who is there, and what somebody asks for by hand.

The owner sends the whole state on every change and as a heartbeat; an API server says that it is there, and
what it is asked. Either may be away for a while: the other goes on with what it knows.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from migration.tasks import BackgroundTasks
from pd_serve.comm.messages import Call, InstanceInfo, Join, Members, Reply, ToApiServerFromOwner, ToOwner
from pd_serve.comm.roster import InstanceRegistry
from pd_serve.comm.wire import Wire
from pd_serve.errors import (
    EngineDeadError,
    InvalidRequestError,
    MigrationRefusedError,
    PdServeError,
    RefusalCode,
    UnknownTargetError,
)
from pd_serve.frontend.request_tracker import RequestTracker
from pd_serve.manager.instance_pool import InstancePool
from pd_serve.observe.timeline import ObservedMigration
from pd_serve.scheduler.scheduler_process import SCHEDULER
from router.load import ROLES

logger = logging.getLogger(__name__)

MANAGER = "owner"

HEARTBEAT_S = 1.0

#: How often an API server looks whether what is leaving has no request of its own any more.
LOOK_S = 0.05

#: Who has said nothing for so long is gone; an API server looks for the owner anew.
LEASE_S = 3.0

#: How long API servers may take to find a new owner.
GRACE_S = 10.0

CALL_TIMEOUT_S = 60.0

#: Errors that keep their kind on the way; the HTTP layer gives them different status codes.
KINDS: dict[str, type[PdServeError]] = {
    kind.__name__: kind for kind in (UnknownTargetError, InvalidRequestError)
}


class Caller:
    """Calls by message, and their answers."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._ids = itertools.count()
        self._waiting: dict[str, asyncio.Future[Any]] = {}

    async def call(self, peer: str, method: str, *arguments: Any) -> Any:
        """Raises: PdServeError: as the other side has; TimeoutError: no answer."""
        call_id = f"{self._wire.name}.{next(self._ids)}"
        future = self._waiting[call_id] = asyncio.get_running_loop().create_future()
        try:
            if not self._wire.send(peer, Call(call_id, method, list(arguments))):
                raise EngineDeadError(f"{peer} is not there")
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await future
        finally:
            del self._waiting[call_id]

    def answered(self, reply: Reply) -> None:
        future = self._waiting.get(reply.call_id)
        if future is None or future.done():
            return
        if reply.error is None:
            future.set_result(reply.value)
        elif reply.kind == MigrationRefusedError.__name__:
            future.set_exception(MigrationRefusedError(reply.error, reply.code))
        else:
            future.set_exception(KINDS.get(reply.kind, EngineDeadError)(reply.error))


async def answer(work: Awaitable[Any], call_id: str) -> Reply:
    """What to send back to a call."""
    try:
        return Reply(call_id, await work)
    except PdServeError as error:
        return Reply(call_id, None, str(error), type(error).__name__, getattr(error, "code", None))
    except TimeoutError:
        return Reply(call_id, None, "no answer in time", EngineDeadError.__name__)


class ManagerDesk:
    """The owner's side.

    Attributes:
        address: Where API servers reach it.
        fleet: Does what they ask; set before anybody is told the address.
    """

    fleet: InstancePool

    def __init__(self, wire: Wire) -> None:
        self.address = wire.listen(self._on_frames)
        self._wire = wire
        self._caller = Caller(wire)
        self._decode = wire.decoder(ToOwner)
        self._loop = asyncio.get_running_loop()
        self._servers: dict[str, tuple[float, Join]] = {}
        self._roster: InstanceRegistry | None = None
        self._scheduler = ""
        self._complete_at = 0.0
        self._tasks = BackgroundTasks()
        self._changed = asyncio.Event()

    def open(self, roster: InstanceRegistry, fleet: InstancePool, *, took_over: bool = False) -> None:
        """Begins to tell who is there. After another owner, API servers that it knew have yet to come."""
        self._roster, self.fleet = roster, fleet
        self._complete_at = self._loop.time() + (GRACE_S if took_over else 0.0)
        self._tasks.start(self._tell_all())

    async def close(self) -> None:
        await self._tasks.cancel()

    def scheduler_at(self, address: str) -> None:
        self._scheduler = address
        self.changed()

    def changed(self) -> None:
        """API servers are told, soon."""
        self._changed.set()

    def is_claimed(self, instance_id: str) -> bool:
        """Whether an API server may still have requests there."""
        claimed = any(instance_id not in join.clear for _, join in self._servers.values())
        return claimed or self._loop.time() < self._complete_at

    async def _tell_all(self) -> None:
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._changed.wait()
            except TimeoutError:
                oldest = self._loop.time() - LEASE_S
                for name in [name for name, (heard_at, _) in self._servers.items() if heard_at < oldest]:
                    logger.warning("API server %s is gone", name)
                    del self._servers[name]
                    self._wire.disconnect(name)
            self._changed.clear()
            members = self._members()
            for name in self._servers:
                self._wire.send(name, members)

    def _members(self) -> Members:
        assert self._roster is not None
        state = self.fleet.state() | {"api_servers": sorted(self._servers)}
        leaving = sorted(self.fleet.leaving)
        instances = sorted(self._roster.instances, key=_by_role_and_number)
        return Members(self.address, instances, self._scheduler, leaving, state)

    def _on_frames(self, frames: list[bytes]) -> None:
        sender, message = frames[0].decode(), self._decode(frames[1])
        match message:
            case Join():
                news = sender not in self._servers
                self._servers[sender] = (self._loop.time(), message)
                self._wire.connect(sender, message.address)
                if news and self._roster is not None:
                    self._wire.send(sender, self._members())
            case Call():
                self._tasks.start(self._answer(sender, message))
            case Reply():
                self._caller.answered(message)

    async def _answer(self, sender: str, call: Call) -> None:
        self._wire.send(sender, await answer(self._do(sender, call), call.call_id))

    async def _do(self, sender: str, call: Call) -> Any:
        match call.method, call.arguments:
            case "drain", [instance_id, draining, stop]:
                self.fleet.drain(instance_id, draining=draining, stop=stop)
            case "scale", [sizes]:
                self.fleet.scale(sizes)
            case "restart", []:
                self.fleet.restart()
            case "migrate", [request_id, destination]:
                return await self._migrate(sender, request_id, destination)
            case "find_requests", [name]:
                return await self._find_requests(sender, name)
            case _:
                raise InvalidRequestError(f"{call.method} is nothing that the owner does")

    async def _migrate(self, sender: str, request_id: str, destination: str) -> Any:
        """Asks the other API servers: it is the request of one of them."""
        for server in self._others(sender):
            try:
                return await self._caller.call(server, "migrate", request_id, destination)
            except UnknownTargetError:
                continue
        raise UnknownTargetError(f"no running request {request_id!r}")

    async def _find_requests(self, sender: str, name: str) -> list[Any]:
        calls = (self._caller.call(server, "find_requests", name) for server in self._others(sender))
        return list(itertools.chain.from_iterable(await asyncio.gather(*calls)))

    def _others(self, sender: str) -> list[str]:
        return [server for server in self._servers if server != sender]


def _by_role_and_number(info: InstanceInfo) -> tuple[int, int]:
    """Not by who was ready first: as people read a list."""
    return ROLES.index(info.role), int(info.instance_id.rpartition("-")[2])


class ManagerClient:
    """The API server's side. Implements `ClusterView`.

    Args:
        find_owner: Gives the owner's address. Raises: PdServeError: it is not to be found now.

    Attributes:
        internal_ids: The engine client's: ids of a request by what a client calls it.
    """

    def __init__(self, wire: Wire, find_manager: Callable[[], Awaitable[str]]) -> None:
        self.address = wire.listen(self._on_frames)
        self.internal_ids: Callable[[str], list[str]] = lambda request_id: [request_id]
        self._wire = wire
        self._find_owner = find_manager
        self._caller = Caller(wire)
        self._decode = wire.decoder(ToApiServerFromOwner)
        self._loop = asyncio.get_running_loop()
        self._router: RequestTracker | None = None
        self._members: Members | None = None
        self._known = asyncio.Event()
        self._heard_at = -LEASE_S
        self._tasks = BackgroundTasks()
        self._tasks.start(self._keep_in_touch())

    async def close(self) -> None:
        await self._tasks.cancel()

    async def instances(self) -> list[InstanceInfo]:
        """Waits until there are any."""
        await self._known.wait()
        assert self._members is not None
        return self._members.instances

    def attach(self, router: RequestTracker) -> None:
        """From now on the router is told who is there."""
        self._router = router
        self._update()

    # ---- the owner

    async def _keep_in_touch(self) -> None:
        looked = joined = -LEASE_S
        clear: list[str] = []
        while True:
            now = self._loop.time()
            if now - max(self._heard_at, looked) >= LEASE_S:
                looked = now
                await self._look_for_owner()
            if self._clear() != clear or now - joined >= HEARTBEAT_S:
                clear, joined = self._clear(), now
                self._wire.send(MANAGER, Join(self.address, clear))
            leaving = self._members is not None and self._members.leaving
            await asyncio.sleep(LOOK_S if leaving or not self._known.is_set() else HEARTBEAT_S)

    async def _look_for_owner(self) -> None:
        try:
            async with asyncio.timeout(LEASE_S):
                self._wire.connect(MANAGER, await self._find_owner())
        except (PdServeError, TimeoutError) as error:
            logger.debug("the owner of the instances is not there: %s", error)

    def _clear(self) -> list[str]:
        """Leaving instances that no request of ours is at, nor will be."""
        if self._members is None or self._router is None:
            return []
        loads = [self._router.load_of(instance_id) for instance_id in self._members.leaving]
        names = [load.instance_id for load in loads if load is not None and load.draining]
        return [name for name in names if self._router.is_empty(name)]

    def _on_frames(self, frames: list[bytes]) -> None:
        sender, message = frames[0].decode(), self._decode(frames[1])
        match message:
            case Members():
                self._heard_at = self._loop.time()
                self._members = message
                if message.instances:
                    self._known.set()
                self._update()
            case Call():
                self._tasks.start(self._answer(sender, message))
            case Reply():
                self._caller.answered(message)

    def _update(self) -> None:
        router, members = self._router, self._members
        if router is None or members is None:
            return
        router.reports.on_manager(members.state)
        now = {info.instance_id: info for info in members.instances}
        for known in list(router.instances):
            if now.get(known.instance_id) != known:
                router.leave(known.instance_id)
        for info in members.instances:
            if info.instance_id not in router.instances:
                router.join(info)
        if members.scheduler:
            router.instances.introduce_scheduler(SCHEDULER, members.scheduler)

    # ---- ClusterView

    @property
    def _requests(self) -> RequestTracker:
        assert self._router is not None
        return self._router

    @property
    def num_waiting(self) -> int:
        return self._requests.num_waiting

    @property
    def num_live(self) -> int:
        return self._requests.num_live

    def snapshot(self) -> dict[str, Any]:
        snapshot = self._requests.snapshot()
        if self._members is None:
            return snapshot
        state = dict(self._members.state)
        there = {row["id"] for row in snapshot["instances"]}
        snapshot["instances"] += [_blank(row) for row in state.pop("coming") if row["id"] not in there]
        if self._loop.time() - self._heard_at > LEASE_S:
            state["scheduler"] |= {"state": "absent"}
            state["restart"] |= {"running": False}
        snapshot["owner"] = "alive" if self._loop.time() - self._heard_at <= LEASE_S else "absent"
        return snapshot | state

    async def migrate(self, request_id: str, destination: str) -> ObservedMigration:
        try:
            return await self._requests.migrate(request_id, destination)
        except UnknownTargetError:
            if destination not in self._requests.instances:
                raise
        # With several API servers it may be another one's.
        value = await self._caller.call(MANAGER, "migrate", request_id, destination)
        return msgspec.convert(value, ObservedMigration)

    async def find_requests(self, name: str) -> list[dict[str, Any]]:
        found = self._requests.find_requests(name)
        return found or list(await self._caller.call(MANAGER, "find_requests", name))

    async def check_integrity(self) -> list[str]:
        return await self._requests.check_integrity()

    async def drain(self, instance_id: str, *, draining: bool = True, stop: bool = False) -> None:
        await self._caller.call(MANAGER, "drain", instance_id, draining, stop)

    async def scale(self, sizes: dict[str, int]) -> None:
        await self._caller.call(MANAGER, "scale", sizes)

    async def restart(self) -> None:
        await self._caller.call(MANAGER, "restart")

    async def _answer(self, sender: str, call: Call) -> None:
        self._wire.send(sender, await answer(self._do(call), call.call_id))

    async def _do(self, call: Call) -> Any:
        """What another API server was asked, and does not have."""
        match call.method, call.arguments:
            case "migrate", [request_id, destination]:
                ids = self.internal_ids(request_id)
                if len(ids) > 1:
                    text = f"{request_id} names {len(ids)} running requests"
                    raise MigrationRefusedError(text, RefusalCode.AMBIGUOUS_REQUEST)
                return await self._requests.migrate(ids[0] if ids else request_id, destination)
            case "find_requests", [name]:
                return self._requests.find_requests(name)
            case _:
                raise InvalidRequestError(f"{call.method} is nothing that an API server does")


def _blank(coming: dict[str, Any]) -> dict[str, Any]:
    """A row for an instance that is not there yet."""
    counts = ("total_blocks", "free_blocks", "running", "waiting", "migrating_in", "migrating_out")
    return coming | {"draining": False, "node": "", "pid": 0, "freeness": 0.0} | dict.fromkeys(counts, 0)
