"""Every kind of engine with two workers, whose requests move to one with two workers or with one."""

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

import pytest
import pytest_asyncio

from pd_serve.models import resolve, tiny
from pd_serve.models.cache import cached_directory
from pd_serve.models.kinds import KINDS
from tests.integration.worker_pair import PROMPT, Pair, pair_of

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(400),
    pytest.mark.skipif("PD_SERVE_ALL_KINDS" not in os.environ, reason="`make kinds` runs them, in 8 minutes"),
]

#: Its only head with keys is the same in both workers.
ONE_KV_HEAD = tiny.RandomLlama("1", 3, 128, 384, num_layers=4, num_heads=4, num_kv_heads=1)


@dataclass(frozen=True)
class Case:
    """Two engines.

    Attributes:
        workers: Of the first engine; the other one has two.
        undivided: Why an engine with another number of workers does not exchange requests with them.
        needed: Places of the reads that cannot be left out, of all ranks.
    """

    model: str
    workers: int
    undivided: str | None = None
    needed: tuple[int, ...] = (0, 1)

    def __str__(self) -> str:
        return f"{self.model}, {self.workers} and 2"

    @property
    def path(self) -> str:
        if self.model == "one KV head":
            return str(cached_directory("one-kv-head-1", partial(tiny.build, ONE_KV_HEAD)))
        return resolve(self.model)


_STATES = "states of linear attention are not divided by heads alone"

CASES = [
    Case("tiny", 2),
    Case("tiny", 4),  # more workers than heads with keys: two workers have the same
    Case("one KV head", 1),
    Case("tiny-gemma3", 1),
    Case("tiny-deepseek-v2", 1),
    Case("tiny-deepseek-v2", 2),
    Case("tiny-falcon-h1", 2, _STATES),
    Case("tiny-qwen3-next", 2, _STATES),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    assert isinstance(request.param, Case)
    return request.param


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pair(case: Case) -> AsyncIterator[Pair]:
    kind = KINDS.get(case.model)
    shared = {"dtype": kind.dtype, **kind.engine_arguments} if kind is not None else {}
    async with pair_of(
        case.path, *[{**shared, "tensor_parallel_size": workers} for workers in (case.workers, 2)]
    ) as pair:
        yield pair


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
async def test_a_request_moved_there_and_back_has_the_output_of_an_unmoved_one(pair: Pair, kind: str) -> None:
    from tests.integration import engine_rig

    params = getattr(engine_rig, kind)(120)
    expected = await pair.engines[0].generate("unmoved", PROMPT, params)

    assert await pair.moved_twice(params) == expected

    assert not pair.failures


async def test_a_copy_without_one_of_the_ranks_is_seen_in_the_output(pair: Pair, case: Case) -> None:
    from tests.integration.engine_rig import greedy

    expected = await pair.engines[0].generate("unmoved", PROMPT, greedy(120))

    for left_out in case.needed:
        assert await pair.moved_twice(greedy(120), left_out=left_out) != expected


async def test_an_engine_says_whether_its_width_matters(pair: Pair, case: Case) -> None:
    from migration.engine_rules import mismatch

    ours, theirs = (rig.engine.compatibility for rig in pair.engines)

    assert mismatch(ours, theirs) is None
    if case.undivided is None:
        assert ours["tensor parallel size"] == "any"
    else:
        assert ours["tensor parallel size"] == f"2 ({case.undivided})"
