"""Two engines, with workers of their own or without, and the way of a request between them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any
from unittest.mock import patch

import psutil
import pytest

from migration.messages import NO_BLOCK, FinalState, KvPart, MigrationId, RequestId
from migration.transport import head_slices, ranked
from migration.transport.kv_transport import KvHeads
from pd_serve.instance.instance_process import open_transport
from pd_serve.platform.environment import LOOPBACK, engine_environment

PROMPT = [(7 * i) % 200 + 20 for i in range(300)]  # computed in two chunks


class Pair:
    """Two engines with their transports."""

    def __init__(self) -> None:
        self.engines: list[Any] = []
        self.transports: list[Any] = []
        self.failures: list[BaseException] = []
        self._moves = 0

    async def move(self, request_id: str, source: int, *, left_out: int | None = None) -> None:
        """Moves a running request to the other engine, as two llumlets do.

        Args:
            left_out: The place of a read among those of all ranks; it is not made.
        """
        self._moves += 1
        migration = MigrationId(f"move-{self._moves}")
        old, new = self.engines[source], self.engines[1 - source]
        description = await old.engine.describe(RequestId(request_id))
        reservation = await new.engine.reserve(migration, description)
        tables, done = reservation.tables, 0
        answer: Any = None
        while not isinstance(answer, FinalState):
            answer = await old.engine.next_stage(
                description.request_id, description.incarnation, done, suspend=done > 0, reader=migration
            )
            part = answer.tail if isinstance(answer, FinalState) else answer
            if any(run.end > len(table) for run, table in zip(part.runs, tables, strict=True)):
                tables = await new.engine.grow(migration, part.end)
            done = part.end
            with _without(left_out):
                await self._copy(source, _pairs(part, tables, reservation.states))
        new.streams[request_id] = old.streams[request_id]
        await new.engine.commit(migration, answer)
        await old.engine.release(description.request_id)
        await old.engine.unpin(migration)
        await new.engine.publish(migration)

    async def _copy(self, source: int, pairs: list[tuple[int, int]]) -> None:
        here, there = self.transports[1 - source], self.transports[source]
        theirs, ours = ([pair[side] for pair in pairs] for side in (0, 1))
        copied = await here.read(str(source), there.endpoint(), theirs, ours)
        assert copied > 0 or not pairs

    async def moved_twice(self, params: Any, *, left_out: int | None = None) -> list[int]:
        """The output of a request that goes to the other engine and comes back."""
        from tests.integration.engine_rig import eventually

        stream = await self.engines[0].add("r", PROMPT, params)
        for source in (0, 1):
            before = len(stream.tokens)
            await eventually(lambda: len(stream.tokens) > before + 15)  # noqa: B023
            await self.move("r", source, left_out=left_out)
        output: list[int] = await self.engines[0].finish(stream)
        await self.at_rest()
        return output

    def workers(self, engine: int) -> list[psutil.Process]:
        executor = self.engines[engine].engine.core.model_executor
        return [psutil.Process(worker.proc.pid) for worker in executor.workers]

    async def at_rest(self) -> None:
        async with asyncio.timeout(60):
            for rig in self.engines:
                while problems := await rig.engine.check_integrity():
                    assert problems[0].startswith("the model runner keeps state"), problems
                    await asyncio.sleep(0.01)
                pool = rig.engine.core.scheduler.kv_cache_manager.block_pool
                assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@contextlib.asynccontextmanager
async def pair_of(model: str, *arguments: dict[str, Any]) -> AsyncIterator[Pair]:
    """Starts two engines with these arguments of `AsyncEngineArgs`, and ends them.

    Args:
        model: A directory.
    """
    import vllm.envs

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in (engine_environment(1, model) | LOOPBACK).items():
            monkeypatch.setenv(name, value)
        vllm.envs.disable_envs_cache()
        from tests.integration.engine_rig import EngineRig

        pair = Pair()
        try:
            for name, of_engine in zip("ab", arguments, strict=True):
                sizes = {value for key, value in of_engine.items() if key.endswith("parallel_size")}
                backend = "mp" if max(sizes, default=1) > 1 else "uni"
                rig = EngineRig(**{"model": model, "distributed_executor_backend": backend} | of_engine)
                await rig.engine.start()
                pair.engines.append(rig)
                pair.transports.append(await open_transport(name, rig.engine, pair.failures.append))  # type: ignore[arg-type]
            yield pair
        finally:
            for transport in pair.transports:
                transport.close()
            for rig in pair.engines:
                await rig.close()
    vllm.envs.disable_envs_cache()


def _pairs(part: KvPart, tables: list[list[int]], states: list[int]) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    for run, table in zip(part.runs, tables, strict=True):
        pairs += zip(run.block_ids, table[run.first : run.end], strict=True)
    pairs += zip(part.states, states, strict=False)
    return [pair for pair in pairs if NO_BLOCK not in pair]


@contextlib.contextmanager
def _without(left_out: int | None) -> Any:
    """Leaves one read of all ranks' out, if there are several."""

    def plan(ours: Sequence[KvHeads | None], theirs: Sequence[KvHeads | None]) -> list[head_slices.RankRead]:
        planned = head_slices.plan(ours, theirs)
        several = len(planned) > 1
        return [read for place, read in enumerate(planned) if place != left_out or not several]

    with patch.object(ranked, "plan", plan) if left_out is not None else contextlib.nullcontext():
        yield
