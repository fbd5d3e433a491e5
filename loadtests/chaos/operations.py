"""What an operator does to the cluster during the faults: drain, scale, restart, move."""

import asyncio
import random
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from loadtests.answer import StreamError
from loadtests.chaos.schedule import Operation
from loadtests.stream_client import AsyncStreamClient

#: Time after which a drain, a stop or a change of size is undone.
UNDO_S = 8.0

#: Concurrent moves of one operation.
MOVES = 4

CALL_TIMEOUT_S = 75.0


class Operator:
    """Begins operations and undoes them.

    Args:
        sizes: Number of instances by role, which are restored.
    """

    def __init__(self, client: AsyncStreamClient, sizes: Mapping[str, int]) -> None:
        self._client = client
        self._sizes = sizes
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(
        self, operation: Operation, cluster: Mapping[str, Any], active: list[str], dice: random.Random
    ) -> str:
        """Begins an operation in the background. Returns what it is, in words.

        Args:
            cluster: The last body of `GET /cluster`.
            active: X-Request-Id of the running streams.
        """
        rows = [row for row in cluster.get("instances", ()) if row["state"] == "ready"]
        roles = {row["id"]: row["role"] for row in rows}
        names = list(roles)
        match operation:
            case Operation.DRAIN if names:
                name, stop = dice.choice(names), dice.random() < 0.5
                self._start(self._drain(name, roles[name], stop))
                return f"drain of {name}" + (" to its end" if stop else "")
            case Operation.SCALE:
                role = dice.choice(sorted(self._sizes))
                size = max(1, self._sizes[role] + dice.choice((-1, 1)))
                self._start(self._scale(role, size))
                return f"scale {role}={size}"
            case Operation.RESTART:
                self._start(self._post("restart", {}))
                return "rolling restart"
            case Operation.MOVE if names and active:
                for name in dice.sample(active, min(MOVES, len(active))):
                    body = {"request_id": name, "destination": dice.choice(names)}
                    self._start(self._post("migrate", body))
                return "moves"
        return "nothing, as there is no instance for it"

    async def restore(self, cluster: Mapping[str, Any]) -> None:
        """Asks for the sizes of the beginning, and uses drained instances again."""
        await self._post("scale", dict(self._sizes))
        for row in cluster.get("instances", ()):
            if row["draining"]:
                await self._post("drain", {"instance": row["id"], "draining": False})

    async def close(self) -> None:
        """Ends what is still under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _drain(self, name: str, role: str, stop: bool) -> None:
        await self._post("drain", {"instance": name, "stop": stop})
        await asyncio.sleep(UNDO_S)
        if stop:  # its pool has become smaller
            await self._post("scale", {role: self._sizes[role]})
        else:
            await self._post("drain", {"instance": name, "draining": False})

    async def _scale(self, role: str, size: int) -> None:
        await self._post("scale", {role: size})
        await asyncio.sleep(UNDO_S)
        await self._post("scale", {role: self._sizes[role]})

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        """A refusal is an answer, too: the instance has died meanwhile, or the manager is absent."""
        with suppress(StreamError):
            await self._client.json(f"/cluster/{path}", body, CALL_TIMEOUT_S)

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
