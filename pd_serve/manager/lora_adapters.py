"""The LoRA adapters that the cluster serves, loaded and unloaded by operators at run time."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from pd_serve.comm.membership import LoraAdapter
from pd_serve.comm.requests import CallEngine, LoadAdapter, UnloadAdapter
from pd_serve.comm.rpc import RpcClient
from pd_serve.errors import EngineDeadError, InvalidRequestError, UnknownTargetError
from pd_serve.manager.launcher import ManagerNotes
from pd_serve.manager.register import InstanceRegister

#: Adapters of a cluster: every membership message lists them all.
MAX_ADAPTERS = 1000


class LoraAdapters:
    """The adapters, which the membership tells API servers of. Their weights are loaded by the instances.

    An instance that starts later, or has dropped an adapter for others (`--max-cpu-loras`), loads it with the
    first request that uses it.

    Args:
        keep: Announces the adapters, and gives them to the next manager.
    """

    def __init__(
        self, register: InstanceRegister, calls: RpcClient, keep: Callable[[], Awaitable[None]]
    ) -> None:
        self._register = register
        self._calls = calls
        self._keep = keep
        self._by_name: dict[str, LoraAdapter] = {}
        self._flags: set[str] = set()
        self._turn = asyncio.Lock()

    def __iter__(self) -> Iterator[LoraAdapter]:
        return iter(self._by_name.values())

    @property
    def notes(self) -> dict[str, Any]:
        """Fields of `ManagerNotes`."""
        return {"lora_adapters": list(self), "lora_flags": sorted(self._flags)}

    def take_over(self, notes: ManagerNotes) -> None:
        """Those of the last manager."""
        self._by_name = {adapter.name: adapter for adapter in notes.lora_adapters}
        self._flags = set(notes.lora_flags)

    async def load(self, sender: str, request: LoadAdapter) -> None:
        """Serves the call: returns when all instances have loaded the adapter.

        What a flag names is loaded once, and not again when another API server starts: operators may have
        replaced or unloaded it, and its files may be gone.

        Raises:
            InvalidRequestError: The name is in use, there are too many, or an instance cannot load it.
        """
        adapter = request.adapter
        async with self._turn:
            if request.by_flag and adapter.name in self._flags:
                return
            known = self._by_name.get(adapter.name)
            if known is not None and (request.by_flag or (known == adapter and not request.reload)):
                return
            if known is not None and not request.reload:
                text = f"the adapter {adapter.name!r} is loaded from {known.path}"
                raise InvalidRequestError(f"{text}; unload it, or set load_inplace")
            others = [other for other in self._by_name.values() if other.name != adapter.name]
            if len(others) >= MAX_ADAPTERS:
                raise InvalidRequestError(f"{len(others)} LoRA adapters are loaded, and no more may be")
            if any(other.number == adapter.number for other in others):
                raise InvalidRequestError(f"give {adapter.name!r} another name: its number is in use")
            arguments = [*adapter.for_engine, True]
            await self._tell_all(CallEngine("load_adapter", arguments))
            self._by_name[adapter.name] = adapter
            if request.by_flag:
                self._flags.add(adapter.name)
            await self._keep()

    async def unload(self, sender: str, request: UnloadAdapter) -> None:
        """Serves the call. Requests that use the adapter go on; its weights stay until others need the room.

        Raises:
            UnknownTargetError: There is no such adapter.
        """
        async with self._turn:
            if self._by_name.pop(request.name, None) is None:
                raise UnknownTargetError(f"no LoRA adapter {request.name!r}")
            await self._keep()

    async def _tell_all(self, request: CallEngine) -> None:
        """Raises: PdServeError: The first one of an instance that lives."""
        names = list(self._register.infos)
        answers = await asyncio.gather(
            *(self._calls.call(name, request) for name in names), return_exceptions=True
        )
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, TimeoutError):
                answer = EngineDeadError(f"{name} does not answer")
            if isinstance(answer, BaseException) and name in self._register:
                raise answer
