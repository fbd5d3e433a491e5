"""Two real engines of one kind, each with its side of the migration protocol, in one process.

Messages go from loop to loop, and a test can hold or change them on their way. KV blocks are copied from
memory to memory. What no copy has written has other contents than any request would put there.
"""

import asyncio
import ctypes
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from vllm.sampling_params import SamplingParams

from migration.bounds import MigrationBounds
from migration.coordinator import MigrationCoordinator
from migration.messages import (
    NO_BLOCK,
    AnyMigrationMessage,
    Final,
    InstanceId,
    KvPart,
    MigrationMessage,
    RequestDescription,
    RequestId,
    Stage,
)
from migration.record import MigrationRecord
from migration.transport.local import LocalFabric
from pd_serve.models import default_dtype, resolve
from pd_serve.models.kinds import KINDS
from tests.integration.engine_rig import EngineRig, Stream, eventually

#: Every byte of it. A number of 12, in float32 and in bfloat16: far from what is in a cache, and no overflow.
RUBBISH = 0x41

OnWay = Callable[[AnyMigrationMessage], Awaitable[AnyMigrationMessage]]


async def unchanged(message: AnyMigrationMessage) -> AnyMigrationMessage:
    return message


@dataclass
class Member:
    """One engine of a pair."""

    name: InstanceId
    rig: EngineRig
    coordinator: MigrationCoordinator
    inbox: asyncio.Queue[tuple[InstanceId, AnyMigrationMessage]]

    @property
    def pool(self) -> Any:
        return self.rig.engine.core.scheduler.kv_cache_manager.block_pool


class EnginePair:
    """Made and used on one event loop.

    Args:
        kind: A name in `KINDS`, or a demo model.
        more: Further arguments of the engines.

    Attributes:
        streams: What the client has got of each request, from whichever engine.
        on_way: Called with every message before it is delivered; what it returns is delivered.
    """

    def __init__(self, kind: str, **more: Any) -> None:
        self._arguments = {
            "model": resolve(kind),
            "dtype": default_dtype(kind),
            "enable_prefix_caching": True,
            **(KINDS[kind].engine_arguments if kind in KINDS else {}),
            **more,
        }
        self.streams: dict[str, Stream] = {}
        self.on_way: OnWay = unchanged
        self._fabric = LocalFabric()
        self._tasks: list[asyncio.Task[None]] = []
        self._members: dict[str, Member] = {}
        self._stepping = threading.Lock()  # vLLM has the context of a step in a variable of its module

    @property
    def a(self) -> Member:
        return self._members["a"]

    @property
    def b(self) -> Member:
        return self._members["b"]

    async def start(self) -> None:
        for name in (InstanceId("a"), InstanceId("b")):
            self._members[name] = await self._start(name)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for member in self._members.values():
            await member.coordinator.close()
            await member.rig.close()

    async def _start(self, name: InstanceId) -> Member:
        rig = EngineRig(**self._arguments)
        rig.streams = self.streams
        await rig.engine.start()
        step = rig.engine.core.step_fn

        def exclusive_step() -> Any:
            with self._stepping:
                return step()

        rig.engine.core.step_fn = exclusive_step
        transport = self._fabric.transport(name)
        transport.register(rig.engine.regions)

        def send(peer: InstanceId, message: MigrationMessage) -> None:
            self._members[peer].inbox.put_nowait((name, message))  # type: ignore[arg-type]

        # Tests hold messages for as long as they like.
        bounds = MigrationBounds(reply_s=120, copy_s=120, acknowledge_s=120, lease_s=120, tail_s=120)
        coordinator = MigrationCoordinator(
            name, rig.engine, transport, send, bounds=bounds, on_failure=rig.deaths.append
        )
        rig.on_requests_ended = coordinator.requests_ended
        member = Member(name, rig, coordinator, asyncio.Queue())
        self._tasks.append(asyncio.create_task(self._deliver(member)))
        return member

    async def _deliver(self, member: Member) -> None:
        while True:
            sender, message = await member.inbox.get()
            try:
                member.coordinator.on_message(sender, await self.on_way(message))
            except Exception as error:
                member.rig.deaths.append(error)

    # ---- requests

    async def add(
        self, member: Member, request_id: str, prompt: list[int], params: SamplingParams, **more: Any
    ) -> Stream:
        return await member.rig.add(request_id, prompt, params, **more)

    async def tokens(self, request_id: str, number: int) -> None:
        """Returns when the client has this number of tokens."""
        await eventually(lambda: len(self.streams[request_id].tokens) >= number or self.broken)

    async def move(self, request_id: str, source: Member, destination: Member) -> MigrationRecord:
        record = await self.start_move(request_id, source, destination)
        assert record.committed, record.refusal
        return record

    def start_move(
        self,
        request_id: str,
        source: Member,
        destination: Member,
        description: RequestDescription | None = None,
    ) -> "asyncio.Task[MigrationRecord]":
        migrate = source.coordinator.migrate
        return asyncio.create_task(
            migrate(RequestId(request_id), destination.name, "test", description=description)
        )

    def append_only(self, member: Member) -> list[Any]:
        """vLLM's managers of the cache groups whose full blocks are never written again."""
        return member.rig.engine.scheduler.cache_groups._append_only

    async def abort(self, request_id: str) -> None:
        """The client leaves; its abort is passed on to wherever the request is."""
        for member in self._members.values():
            await member.rig.engine.abort([RequestId(request_id)])

    @property
    def broken(self) -> list[BaseException]:
        return [error for member in self._members.values() for error in member.rig.deaths]

    # ---- between two tests

    async def rest(self) -> None:
        """Waits until both engines are at rest. Raises: AssertionError: something is held."""
        self.on_way = unchanged
        problems = ["not asked yet"]
        for _ in range(1000):
            problems = [problem for member in self._members.values() for problem in await _held(member)]
            if not problems or self.broken:
                break
            await asyncio.sleep(0.01)
        assert not self.broken, self.broken
        assert not problems, problems
        self.streams.clear()

    async def forget(self) -> None:
        """Empties the prefix caches of engines at rest, and their memory of all that was in it."""
        for member in self._members.values():
            await member.rig.engine.utility("reset_prefix_cache")
            for region in member.rig.engine.regions:
                begin, size = (
                    region.address + region.block_bytes,
                    (region.num_blocks - 1) * region.block_bytes,
                )
                ctypes.memset(begin, RUBBISH, size)


async def _held(member: Member) -> list[str]:
    engine, pool = member.rig.engine, member.pool
    problems = [f"{request_id} lives" for request_id in await engine.live_requests()]
    problems += await engine.check_integrity() + member.coordinator.check_integrity()
    if (missing := pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()) != 0:
        problems.append(f"{missing} blocks are not free")
    return [f"{member.name}: {problem}" for problem in problems]


def left_out(message: AnyMigrationMessage, group: int, state: int | None) -> AnyMigrationMessage:
    """The message without the blocks of one cache group.

    Args:
        state: Which of the groups with state it is; None for another one.
    """
    match message:
        case Stage(part=part):
            return msgspec.structs.replace(message, part=_without(part, group, state))
        case Final(state=final):
            tail = _without(final.tail, group, state)
            return msgspec.structs.replace(message, state=msgspec.structs.replace(final, tail=tail))
    return message


def _without(part: KvPart, group: int, state: int | None) -> KvPart:
    runs, states = list(part.runs), list(part.states)
    runs[group] = msgspec.structs.replace(runs[group], block_ids=[NO_BLOCK] * len(runs[group].block_ids))
    if state is not None and states:
        states[state] = NO_BLOCK
    return msgspec.structs.replace(part, runs=runs, states=states)
