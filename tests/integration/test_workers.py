"""Engines with two worker processes each: their requests move over the workers' transports."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from typing import Any

import psutil
import pytest
import pytest_asyncio

from migration.messages import FinalState, MigrationId, RequestId
from migration.transport.ranked import RankedTransport
from pd_serve.instance.instance_process import open_transport
from pd_serve.models import resolve
from pd_serve.platform.environment import LOOPBACK, engine_environment

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]

PROMPT = [(7 * i) % 200 + 20 for i in range(300)]  # computed in two chunks


class Pair:
    """Two engines with their transports."""

    def __init__(self, engines: "list[Any]", transports: list[Any]) -> None:
        self.engines, self.transports = engines, transports
        self.failures: list[BaseException] = []
        self._moves = 0

    async def move(self, request_id: str, source: int, *, ranks: Sequence[int] = (0, 1)) -> None:
        """Moves a running request to the other engine, as two llumlets do; copies on these ranks only."""
        self._moves += 1
        migration = MigrationId(f"move-{self._moves}")
        old, new = self.engines[source], self.engines[1 - source]
        copying = [RankedTransport([t._ranks[rank] for rank in ranks]) for t in self.transports]
        description = await old.engine.describe(RequestId(request_id))
        (blocks,), done = (await new.engine.reserve(migration, description)).tables, 0
        answer: Any = None
        while not isinstance(answer, FinalState):
            answer = await old.engine.next_stage(
                description.request_id, description.incarnation, done, suspend=done > 0, reader=migration
            )
            part = answer.tail if isinstance(answer, FinalState) else answer
            (run,), done = part.runs, part.end
            if run.end > len(blocks):
                (blocks,) = await new.engine.grow(migration, part.end)
            local = blocks[run.first : run.end]
            copied = await copying[1 - source].read(
                str(source), copying[source].endpoint(), run.block_ids, local
            )
            assert copied > 0 or not local
        new.streams[request_id] = old.streams[request_id]
        await new.engine.commit(migration, answer)
        await old.engine.release(description.request_id)
        await old.engine.unpin(migration)
        await new.engine.publish(migration)

    def workers(self, engine: int) -> list[psutil.Process]:
        executor = self.engines[engine].engine.core.model_executor
        return [psutil.Process(worker.proc.pid) for worker in executor.workers]


@pytest.fixture(scope="module", params=["tensor_parallel_size", "pipeline_parallel_size"])
def parallel(request: pytest.FixtureRequest) -> str:
    """What the workers share: the heads of each layer, or the layers."""
    return str(request.param)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pair(parallel: str) -> AsyncIterator[Pair]:
    import vllm.envs

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (engine_environment(1, resolve("tiny")) | LOOPBACK).items():
            patch.setenv(name, value)
        vllm.envs.disable_envs_cache()
        from tests.integration.engine_rig import EngineRig

        pair = Pair([], [])
        try:
            for name in ("a", "b"):
                rig = EngineRig(**{parallel: 2}, distributed_executor_backend="mp")
                await rig.engine.start()
                pair.engines.append(rig)
                pair.transports.append(await open_transport(name, rig.engine, pair.failures.append))
            yield pair
        finally:
            for transport in pair.transports:
                transport.close()
            for rig in pair.engines:
                await rig.close()
        vllm.envs.disable_envs_cache()


async def at_rest(pair: Pair) -> None:
    async with asyncio.timeout(60):
        for rig in pair.engines:
            while problems := await rig.engine.check_integrity():
                assert problems[0].startswith("the model runner keeps state"), problems
                await asyncio.sleep(0.01)
            pool = rig.engine.core.scheduler.kv_cache_manager.block_pool
            assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


async def moved_twice(pair: Pair, params: Any, *, ranks: Sequence[int] = (0, 1)) -> list[int]:
    """The output of a request that goes to the other engine and comes back."""
    from tests.integration.engine_rig import eventually

    stream = await pair.engines[0].add("r", PROMPT, params)
    for source in (0, 1):
        before = len(stream.tokens)
        await eventually(lambda: len(stream.tokens) > before + 15)  # noqa: B023
        await pair.move("r", source, ranks=ranks)
    output: list[int] = await pair.engines[0].finish(stream)
    await at_rest(pair)
    return output


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
async def test_a_request_moved_there_and_back_has_the_output_of_an_unmoved_one(pair: Pair, kind: str) -> None:
    from tests.integration import engine_rig

    params = getattr(engine_rig, kind)(120)
    expected = await pair.engines[0].generate("unmoved", PROMPT, params)

    assert await moved_twice(pair, params) == expected

    assert not pair.failures


@pytest.mark.parametrize("left_out", [0, 1])
async def test_a_copy_without_one_of_the_ranks_is_seen_in_the_output(pair: Pair, left_out: int) -> None:
    from tests.integration.engine_rig import greedy

    expected = await pair.engines[0].generate("unmoved", PROMPT, greedy(120))

    assert await moved_twice(pair, greedy(120), ranks=[1 - left_out]) != expected


async def test_engines_with_another_division_of_the_work_do_not_exchange_requests(
    pair: Pair, parallel: str
) -> None:
    from migration.engine_rules import mismatch

    ours = pair.engines[0].engine.compatibility
    theirs = ours | {parallel.replace("_", " "): "1"}

    assert mismatch(ours, pair.engines[1].engine.compatibility) is None
    assert mismatch(ours, theirs) is not None


async def test_a_killed_worker_ends_its_engine_and_leaves_no_process(pair: Pair) -> None:
    """The last test of the pair. An idle engine makes no step that could fail."""
    from tests.integration.engine_rig import eventually

    rig, workers = pair.engines[1], pair.workers(1)

    os.kill(workers[1].pid, signal.SIGKILL)

    await eventually(lambda: pair.failures)
    assert "worker 1 of b has ended" in str(pair.failures[0])
    await eventually(lambda: rig.deaths)
    await eventually(lambda: not any(worker.is_running() for worker in workers))
