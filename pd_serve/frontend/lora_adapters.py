"""LoRA adapters as an API server knows them: from the manager, by the membership."""

import asyncio
from collections.abc import Callable, Sequence

from pd_serve.comm.membership import LoraAdapter
from pd_serve.comm.requests import LoadAdapter, UnloadAdapter
from pd_serve.comm.timing import POLL_S
from pd_serve.frontend.manager_client import ManagerClient


class OfferedAdapters:
    """Asks the manager to load and unload adapters, and follows those that it has.

    Until it is followed, the API server starts, and loads what its flags name.
    """

    def __init__(self, manager: ManagerClient) -> None:
        self._manager = manager
        self._known: list[LoraAdapter] = []
        self._on_change: Callable[[Sequence[LoraAdapter]], None] | None = None

    def follow(self, on_change: Callable[[Sequence[LoraAdapter]], None]) -> None:
        """Calls back with the present adapters, and whenever they have changed."""
        self._on_change = on_change
        on_change(self._known)

    def on_membership(self, adapters: list[LoraAdapter]) -> None:
        if adapters != self._known:
            self._known = adapters
            if self._on_change is not None:
                self._on_change(adapters)

    async def load(self, adapter: LoraAdapter, *, reload: bool = False) -> None:
        """Returns when all instances have the adapter. Raises: PdServeError: It is not loaded."""
        by_flag = self._on_change is None
        while by_flag and not self._manager.is_alive:  # noqa: ASYNC110
            # An API server that starts hears nothing while it imports vLLM and builds its application.
            await asyncio.sleep(POLL_S)
        await self._manager.call(LoadAdapter(adapter, reload, by_flag))

    async def unload(self, name: str) -> None:
        """Raises: PdServeError: It is not unloaded."""
        await self._manager.call(UnloadAdapter(name))
