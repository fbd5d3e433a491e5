"""The instances that an API server knows: joining, leaving, calls and their answers."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from migration.tasks import BackgroundTasks
from pd_serve.comm.messages import Call, Hello, InstanceInfo, MigrationEnded, PeerLost, Reply
from pd_serve.comm.wire import Wire
from pd_serve.errors import EngineDeadError, UnknownTargetError
from router.request import NO_DEMAND, Demand

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
CALL_TIMEOUT_S = 60.0

#: An instance that has said nothing for so long is gone, whether its process lives or not.
SILENT_S = 30.0


class InstanceDirectory:
    """Every live instance, by id. Keeps all of them told who the others are.

    Args:
        address, token_endpoint: Where instances reach this API server.
        num_slots: Instances that may live at a time; vLLM's metrics tell them apart by slot.
        owns: Whether instances are started and stopped here; the scheduler asks for it where that is so.
        waiting: Requests here that no instance has yet; the scheduler is told.
        on_silent: Told once of an instance that says nothing any more.

    Attributes:
        starting: Instances that are coming, by role; the scheduler is told with the next greeting.
    """

    def __init__(
        self,
        name: str,
        wire: Wire,
        address: str,
        token_endpoint: str,
        num_slots: int,
        *,
        owns: bool = True,
        waiting: Callable[[], Demand] = lambda: NO_DEMAND,
        on_silent: Callable[[str], object] = lambda instance_id: None,
    ) -> None:
        self.slots = list(range(num_slots))
        self._owns = owns
        self._waiting = waiting
        self._on_silent = on_silent
        self._heard_at: dict[str, float] = {}
        self.starting: dict[str, int] = {}
        self.token_endpoint = token_endpoint
        self._name = name
        self._wire = wire
        self._address = address
        self._infos: dict[str, InstanceInfo] = {}
        self._slot_of: dict[str, int] = {}
        self._scheduler: str | None = None
        self._scheduler_address = ""
        self._calls: dict[str, tuple[str, asyncio.Future[Any]]] = {}
        self._call_ids = itertools.count()
        self._tasks = BackgroundTasks()
        self._tasks.start(self._heartbeat())

    async def close(self) -> None:
        await self._tasks.cancel()

    def __iter__(self) -> Iterator[InstanceInfo]:
        return iter(self._infos.values())

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self._infos

    def __getitem__(self, instance_id: str) -> InstanceInfo:
        return self._infos[instance_id]

    def slot_of(self, instance_id: str) -> int:
        """An index that vLLM's metrics know."""
        return self._slot_of[instance_id]

    def join(self, info: InstanceInfo) -> None:
        self._infos[info.instance_id] = info
        self.heard(info.instance_id)
        free = set(self.slots) - set(self._slot_of.values())
        self._slot_of[info.instance_id] = min(free, default=0)
        self._wire.connect(info.instance_id, info.address)
        self.greet()

    def introduce_scheduler(self, name: str, address: str) -> None:
        """Keeps a scheduler told too. A new one takes the place of the last."""
        if address == self._scheduler_address:
            return
        if self._scheduler is not None:
            self._wire.disconnect(self._scheduler)
        self._scheduler, self._scheduler_address = name, address
        self._wire.connect(name, address)
        self.greet()

    def leave(self, instance_id: str) -> bool:
        """Forgets a dead instance, fails the calls to it and tells the others. False: it was not known."""
        if self._infos.pop(instance_id, None) is None:
            return False
        self._slot_of.pop(instance_id, None)
        self._heard_at.pop(instance_id, None)
        self._wire.disconnect(instance_id)
        for called, future in self._calls.values():
            if called == instance_id and not future.done():
                future.set_exception(EngineDeadError(f"{instance_id} has died"))
        for peer in self._infos:
            self._wire.send(peer, PeerLost(instance_id))
        self.greet()
        return True

    def heard(self, instance_id: str) -> None:
        """It has reported."""
        self._heard_at[instance_id] = asyncio.get_running_loop().time()

    def send(self, instance_id: str, message: object, payload: Sequence[bytes] = ()) -> bool:
        return self._wire.send(instance_id, message, payload)

    async def call(self, instance_id: str, make: Callable[[str], object]) -> Any:
        """Sends the message that `make` builds around a call id, and waits for the answer to it.

        Raises:
            UnknownTargetError: No such instance.
            EngineDeadError: It died meanwhile.
            TimeoutError: No answer in time.
        """
        call_id = f"{self._name}.{next(self._call_ids)}"
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = (instance_id, future)
        try:
            if not self.send(instance_id, make(call_id)):
                raise UnknownTargetError(f"no instance {instance_id!r}; see GET /cluster")
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await future
        finally:
            del self._calls[call_id]

    async def ask(self, instance_id: str, method: str, *arguments: Any) -> Any:
        """What one instance says to a `Call`. Raises: as `call`, and EngineDeadError: it failed."""
        reply = await self.call(instance_id, lambda call_id: Call(call_id, method, list(arguments)))
        if reply.error is not None:
            raise EngineDeadError(f"{instance_id}: {reply.error}")
        return reply.value

    async def call_all(self, method: str, *arguments: Any) -> dict[str, Any]:
        """Calls one of vLLM's engine utilities on every instance. Raises: EngineDeadError: one failed."""

        names = list(self._infos)
        values = await asyncio.gather(*(self.ask(name, method, *arguments) for name in names))
        return dict(zip(names, values, strict=True))

    def answered(self, message: MigrationEnded | Reply) -> None:
        """Takes the answer to a call. One that nobody waits for any more is ignored."""
        _, future = self._calls.get(message.call_id, ("", None))
        if future is not None and not future.done():
            future.set_result(message)

    def greet(self) -> None:
        """Tells all of them, and the scheduler, who is there."""
        peers = {info.instance_id: info.address for info in self._infos.values()}
        hello = Hello(self._address, self.token_endpoint, peers, self.starting, self._waiting(), self._owns)
        if self._scheduler is not None:
            self._wire.send(self._scheduler, hello)
        for instance_id in self._infos:
            self._wire.send(instance_id, hello)

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self.greet()
            oldest = asyncio.get_running_loop().time() - SILENT_S
            for instance_id in [name for name, heard_at in self._heard_at.items() if heard_at < oldest]:
                logger.error("%s has said nothing for %.0f s: it counts as dead", instance_id, SILENT_S)
                self._on_silent(instance_id)
