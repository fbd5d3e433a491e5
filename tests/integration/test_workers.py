"""Engines with two worker processes: their requests move over the workers' transports."""

import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from pd_serve.models import resolve
from tests.integration.worker_pair import PROMPT, Pair, pair_of

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]

#: What the workers of each engine share: the heads of each layer, or the layers.
DIVISIONS = {
    "pipeline parallel": [{"pipeline_parallel_size": 2}] * 2,
    "one worker and two": [{}, {"tensor_parallel_size": 2}],
}


@pytest.fixture(scope="module", params=DIVISIONS)
def division(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pair(division: str) -> AsyncIterator[Pair]:
    async with pair_of(resolve("tiny"), *DIVISIONS[division]) as pair:
        yield pair


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
async def test_a_request_moved_there_and_back_has_the_output_of_an_unmoved_one(pair: Pair, kind: str) -> None:
    from tests.integration import engine_rig

    params = getattr(engine_rig, kind)(120)
    expected = await pair.engines[0].generate("unmoved", PROMPT, params)

    assert await pair.moved_twice(params) == expected

    assert not pair.failures


@pytest.mark.parametrize("left_out", [0, 1])
async def test_a_copy_without_one_of_the_ranks_is_seen_in_the_output(pair: Pair, left_out: int) -> None:
    from tests.integration.engine_rig import greedy

    expected = await pair.engines[0].generate("unmoved", PROMPT, greedy(120))

    assert await pair.moved_twice(greedy(120), left_out=left_out) != expected


async def test_only_the_number_of_tensor_parallel_workers_may_differ(pair: Pair, division: str) -> None:
    from migration.engine_rules import mismatch

    ours, theirs = (rig.engine.compatibility for rig in pair.engines)
    pipeline = ours | {"pipeline parallel size": "4"}

    assert mismatch(theirs, ours) is None
    assert mismatch(pipeline, ours) is not None
    assert (ours["tensor parallel size"] == "any") == (division != "pipeline parallel")


async def test_a_killed_worker_ends_its_engine_and_leaves_no_process(pair: Pair) -> None:
    """The last test of the pair. An idle engine makes no step that could fail."""
    from tests.integration.engine_rig import eventually

    rig, workers = pair.engines[1], pair.workers(1)

    os.kill(workers[1].pid, signal.SIGKILL)

    await eventually(lambda: pair.failures)
    assert "worker 1 of b has ended" in str(pair.failures[0])
    await eventually(lambda: rig.deaths)
    await eventually(lambda: not any(worker.is_running() for worker in workers))
