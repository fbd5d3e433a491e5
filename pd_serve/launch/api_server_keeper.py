"""Keeps the API servers of `pd-serve serve`: starts them, and another one for each that ends."""

import asyncio
from collections.abc import Awaitable, Callable
from uuid import uuid4

from migration.tasks import BackgroundTasks
from pd_serve.comm.timing import API_SERVER_STOP_S, EARLY_DEATH_S
from pd_serve.errors import PdServeError
from pd_serve.launch.api_server_child import ApiServerChild
from pd_serve.launch.api_server_messages import FlagsParsed, JoinCluster
from pd_serve.manager.backoff import Backoff
from pd_serve.manager.notices import OperatorNotices

#: Starts that fail one after another, while no API server serves, before the service ends.
MAX_FAILED_STARTS = 5


class ApiServerKeeper:
    """Runs on the event loop of the manager.

    Args:
        number: API servers that there should be.
        spawn: Starts the process of an API server, by its name.
        on_ended: Called with the name of an API server whose process has ended.

    Attributes:
        serving: The API servers that serve, by name.
    """

    def __init__(
        self,
        number: int,
        spawn: Callable[[str], Awaitable[ApiServerChild]],
        notices: OperatorNotices,
        on_ended: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.serving: dict[str, ApiServerChild] = {}
        self.on_ended = on_ended
        self._number = number
        self._spawn = spawn
        self._notices = notices
        self._processes: dict[str, ApiServerChild] = {}
        self._cluster: JoinCluster | None = None
        self._backoff = Backoff()
        self._failed_starts = 0
        self._tasks = BackgroundTasks(on_failure=lambda error: None)  # their errors are raised here

    async def start(self) -> FlagsParsed:
        """Starts the first processes. Returns what they have made of vLLM's flags.

        Raises:
            PdServeError: One does not start.
        """
        flags: FlagsParsed = await self._tasks.start(self._start_first())
        return flags

    async def join(self, cluster: JoinCluster) -> None:
        """Has the first API servers join the cluster. Returns when all of them serve.

        Raises:
            PdServeError: One does not start.
        """
        self._cluster = cluster
        joining = [self._tasks.start(self._join(child)) for child in self._processes.values()]
        await asyncio.gather(*joining)

    async def keep(self) -> None:
        """Replaces each API server that ends, until cancelled.

        Raises:
            PdServeError: There is none, and none can be started.
        """
        kept = [self._tasks.start(self._keep(child)) for child in list(self.serving.values())]
        await asyncio.gather(*kept)

    def end(self, name: str) -> None:
        """Ends an API server that hangs, at once. Unknown names are ignored: it has ended."""
        if (child := self._processes.get(name)) is not None:
            child.kill()

    async def stop(self) -> None:
        """Ends all processes: after their requests, or by force when that takes too long."""
        await self._tasks.cancel()
        children = list(self._processes.values())
        for child in children:
            child.terminate()
        ends = asyncio.gather(*(child.ended() for child in children))
        try:
            await asyncio.wait_for(asyncio.shield(ends), API_SERVER_STOP_S)
        except TimeoutError:
            for child in children:
                child.kill()
            await ends

    async def _start_first(self) -> FlagsParsed:
        first = await asyncio.gather(*(self._new() for _ in range(self._number)))
        flags: list[FlagsParsed] = await asyncio.gather(*(self._tasks.start(one.flags()) for one in first))
        return flags[0]

    async def _new(self) -> ApiServerChild:
        name = f"api-{uuid4().hex[:8]}"
        child = self._processes[name] = await self._spawn(name)
        return child

    async def _join(self, child: ApiServerChild) -> None:
        assert self._cluster is not None
        await child.join(self._cluster)
        self.serving[child.name] = child
        self._notices.step(f"{child.name} serves (pid {child.pid})")

    async def _keep(self, child: ApiServerChild) -> None:
        loop = asyncio.get_running_loop()
        while True:
            since = loop.time()
            why = await child.ended()
            self._forget(child)
            self._notices.warn(f"{child.name} {why}; its streams end, and another one starts")
            if loop.time() - since < EARLY_DEATH_S:
                self._backoff.died_early(loop.time())
            else:
                self._backoff.reset()
            child = await self._replacement()

    async def _replacement(self) -> ApiServerChild:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(max(0.0, self._backoff.retry_at - loop.time()))
            child = await self._new()
            try:
                await child.flags()
                await self._join(child)
            except PdServeError as error:
                child.kill()
                await child.ended()
                self._forget(child)
                self._note_failed_start(error)
            else:
                self._failed_starts = 0
                return child

    def _note_failed_start(self, error: PdServeError) -> None:
        now = asyncio.get_running_loop().time()
        self._backoff.failed(now)
        self._failed_starts += 1
        if not self.serving and self._failed_starts >= MAX_FAILED_STARTS:
            raise PdServeError(f"no API server starts any more: {error}") from error
        pause_s = self._backoff.retry_at - now
        self._notices.warn(f"an API server does not start: {error}; the next one starts in {pause_s:.0f} s")

    def _forget(self, child: ApiServerChild) -> None:
        self._processes.pop(child.name, None)
        self.serving.pop(child.name, None)
        self.on_ended(child.name)
