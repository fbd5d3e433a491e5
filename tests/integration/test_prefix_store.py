"""Prefixes that one real scheduler reads out of another one's prefix cache, with a model that is played."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from itertools import count
from typing import Any, TypeVar

import msgspec
import pytest
from vllm.v1.request import Request

from migration.errors import DestinationRefusedError, RefusalCode
from migration.messages import NO_BLOCK, BlockRun, KvPart, MigrationId
from migration.vllm_engine.prefix_store import VllmPrefixStore
from tests.integration.scheduler_lab import KINDS, Kind, Layers, Node, nodes_at_rest, undisturbed

pytestmark = pytest.mark.integration

T = TypeVar("T")

BLOCK = 32
FULL, WINDOW = Layers(), Layers("window", window=BLOCK + 1)
STATES = Layers("state", mode="align")
ENGINES = [(FULL,), (WINDOW,), (WINDOW, FULL), (STATES, FULL, STATES)]
PROMPT = list(range(300, 300 + 5 * BLOCK + 7))

Make = Callable[..., Node]
_ids = count()


class OneStep:
    """In the place of the step loop: one step between two calls."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._calls = 0

    async def call(self, function: Callable[[], T]) -> T:
        if self._calls:
            self._node.step()
        self._calls += 1
        result: T = self._node.call(function)
        return result


class PromptLoader:
    """In the place of `RequestLoader`: a payload is the bytes of a prompt's tokens."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def read(self, payload: list[bytes]) -> Request:
        return self._node.request(f"read {next(_ids)}", msgspec.msgpack.decode(payload[0]), 1)


def store_of(node: Node, **compatibility: str) -> VllmPrefixStore:
    steps: Any = OneStep(node)
    loader: Any = PromptLoader(node)
    return VllmPrefixStore(steps, loader, node.scheduler, compatibility)


def encoded(prompt: list[int]) -> list[bytes]:
    return [msgspec.msgpack.encode(prompt)]


def run(work: Awaitable[T]) -> T:
    async def main() -> T:
        return await work

    return asyncio.run(main())


async def offered(holder: Node, reader: Node, prompt: list[int], copy_id: MigrationId) -> KvPart:
    return await store_of(holder).offer(copy_id, store_of(reader).query(encoded(prompt)))


def copy_prefix(holder: Node, reader: Node, prompt: list[int], left_out: int | None = None) -> int:
    """As `PrefixReader` and `PrefixHolder` do it; one cache group may be left out.

    Returns: the tokens of the prefix.
    """

    async def copy() -> int:
        copy_id, store = MigrationId(f"copy {next(_ids)}"), store_of(reader)
        part = await offered(holder, reader, prompt, copy_id)
        if part.end:
            tables = (await store.reserve(copy_id, store.query(encoded(prompt)), part)).tables
            for group, (run, table) in enumerate(zip(part.runs, tables, strict=bool(tables))):
                pairs = [
                    pair for pair in zip(run.block_ids, table, strict=bool(table)) if NO_BLOCK not in pair
                ]
                if group != left_out:
                    reader.runner.copy_blocks_from(holder.runner, pairs)
            holder.call(holder.scheduler.migrated_blocks.unpin, copy_id)
            await store.publish(copy_id)
        return part.end

    return run(copy())


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
def make() -> Iterator[Make]:
    with nodes_at_rest() as make:
        yield make


def serve(node: Node, request_id: str, prompt: list[int], max_tokens: int) -> int:
    """Serves a request to its end. Returns the tokens that it found in the prefix cache."""
    node.add(request_id, prompt, max_tokens=max_tokens)
    node.step()
    assert node.scheduled is not None
    (new,) = node.scheduled.scheduled_new_reqs
    node.run_to_the_end()
    return new.num_computed_tokens


@pytest.mark.parametrize("layers", ENGINES)
def test_a_second_turn_computes_only_what_no_instance_has(
    kind: Kind, layers: tuple[Layers, ...], make: Make
) -> None:
    holder, reader = make(kind, layers=layers), make(kind, layers=layers)
    serve(holder, "first turn", PROMPT, 70)
    second = PROMPT + holder.streams["first turn"] + [7, 8, 9]
    tokens = copy_prefix(holder, reader, second)
    assert tokens >= len(PROMPT)
    assert serve(reader, "second turn", second, 40) == tokens
    assert reader.streams["second turn"] == undisturbed(second, 40, layers)


@pytest.mark.parametrize("layers", ENGINES)
def test_no_group_can_be_left_out(kind: Kind, layers: tuple[Layers, ...], make: Make) -> None:
    """A negative control: were the copy of one group not needed, the other tests would show nothing."""
    for index in range(len(layers)):
        holder, reader = make(kind, layers=layers), make(kind, layers=layers)
        serve(holder, f"first {index}", PROMPT, 1)
        assert copy_prefix(holder, reader, PROMPT, left_out=index)
        serve(reader, f"second {index}", PROMPT, 20)
        assert reader.streams[f"second {index}"] != undisturbed(PROMPT, 20, layers)


@pytest.mark.parametrize("layers", ENGINES)
def test_only_what_is_not_here_is_copied(kind: Kind, layers: tuple[Layers, ...], make: Make) -> None:
    holder, reader = make(kind, layers=layers), make(kind, layers=layers)
    serve(holder, "long", PROMPT, 1)
    serve(reader, "short", PROMPT[: 2 * BLOCK + 1], 1)
    copied: list[tuple[int, int]] = []
    reader.runner.copy_blocks_from = lambda peer, pairs: (  # type: ignore[method-assign]
        copied.extend(pairs),
        type(reader.runner).copy_blocks_from(reader.runner, peer, pairs),
    )
    assert copy_prefix(holder, reader, PROMPT) == 5 * BLOCK
    assert 0 < len(copied) <= 3 * len(layers)
    assert serve(reader, "whole", PROMPT, 20) == 5 * BLOCK
    assert reader.streams["whole"] == undisturbed(PROMPT, 20, layers)
    assert copy_prefix(holder, reader, PROMPT) == 5 * BLOCK
    assert len(copied) <= 3 * len(layers), "nothing is copied twice"


def test_blocks_of_a_step_in_flight_are_not_offered_before_it_has_ended(kind: Kind, make: Make) -> None:
    """vLLM adds blocks to the prefix cache when it schedules the step that computes them."""
    holder, reader = make(kind), make(kind)
    holder.add("r", PROMPT, max_tokens=3)
    holder.step()
    tokens = copy_prefix(holder, reader, PROMPT)
    assert tokens == 5 * BLOCK
    holder.run_to_the_end()
    assert serve(reader, "again", PROMPT, 20) == tokens
    assert reader.streams["again"] == undisturbed(PROMPT, 20)


def test_offered_blocks_outlive_the_need_of_others(kind: Kind, make: Make) -> None:
    holder, reader = make(kind, num_blocks=14), make(kind)
    serve(holder, "r", PROMPT, 1)
    copy_id = MigrationId("c")
    part = run(offered(holder, reader, PROMPT, copy_id))
    before = [list(holder.runner.memory[block]) for block in part.block_ids]
    serve(holder, "other", list(range(600, 600 + 7 * BLOCK)), 3)
    assert [holder.runner.memory[block] for block in part.block_ids] == before
    holder.call(holder.scheduler.migrated_blocks.unpin, copy_id)
    serve(holder, "third", list(range(700, 700 + 11 * BLOCK)), 3)
    assert [holder.runner.memory[block] for block in part.block_ids] != before


def test_a_copy_that_is_given_up_leaves_nothing(kind: Kind, make: Make) -> None:
    holder, reader = make(kind), make(kind)
    serve(holder, "r", PROMPT, 1)
    copy_id, store = MigrationId("c"), store_of(reader)

    async def give_up() -> None:
        part = await offered(holder, reader, PROMPT, copy_id)
        (table,) = (await store.reserve(copy_id, store.query(encoded(PROMPT)), part)).tables
        assert len(table) == 5
        await store.drop(copy_id)
        await store.drop(copy_id)
        await store.publish(copy_id)

    run(give_up())
    holder.call(holder.scheduler.migrated_blocks.unpin, copy_id)
    assert serve(reader, "again", PROMPT, 5) == 0
    assert reader.streams["again"] == undisturbed(PROMPT, 5)


def test_a_prefix_without_room_is_refused_and_what_runs_goes_on(kind: Kind, make: Make) -> None:
    holder, reader = make(kind), make(kind, num_blocks=10)
    serve(holder, "r", PROMPT, 1)
    reader.add("running", list(range(5 * BLOCK)), max_tokens=30)
    reader.decode("running")
    before = reader.free_blocks
    with pytest.raises(DestinationRefusedError) as refused:
        copy_prefix(holder, reader, PROMPT)
    assert refused.value.refusal.code is RefusalCode.NO_FREE_BLOCKS
    assert reader.free_blocks in (before, before - 1)
    holder.call(holder.scheduler.migrated_blocks.unpin, next(iter(holder.scheduler.migrated_blocks.pinned)))
    reader.run_to_the_end()
    assert reader.streams["running"] == undisturbed(list(range(5 * BLOCK)), 30)


@pytest.mark.parametrize(
    "part",
    [
        KvPart(2 * BLOCK, [BlockRun(0, [1])]),
        KvPart(2 * BLOCK, [BlockRun(1, [1, 2])]),
        KvPart(2 * BLOCK, [BlockRun(0, [1, 2]), BlockRun(0, [3, 4])]),
        KvPart(2 * BLOCK, []),
        KvPart(2 * BLOCK + 1, [BlockRun(0, [1, 2])]),
        KvPart(-BLOCK, [BlockRun(0, [])]),
        KvPart(0, [BlockRun(0, [])]),
        KvPart(6 * BLOCK, [BlockRun(0, [1, 2, 3, 4, 5, 6])]),
    ],
    ids=str,
)
def test_an_offer_that_does_not_fit_is_refused(part: KvPart, make: Make) -> None:
    reader = make(KINDS[0])
    store = store_of(reader)
    with pytest.raises(DestinationRefusedError) as refused:
        run(store.reserve(MigrationId("c"), store.query(encoded(PROMPT)), part))
    assert refused.value.refusal.code is RefusalCode.INCOMPATIBLE


def test_engines_that_differ_share_no_blocks(make: Make) -> None:
    holder, reader = make(KINDS[0]), make(KINDS[0])
    serve(holder, "r", PROMPT, 1)
    query = store_of(reader, model="a").query(encoded(PROMPT))
    with pytest.raises(DestinationRefusedError) as refused:
        run(store_of(holder, model="b").offer(MigrationId("c"), query))
    assert refused.value.refusal.code is RefusalCode.INCOMPATIBLE
    assert not holder.scheduler.migrated_blocks.pinned


def test_an_engine_without_a_prefix_cache_asks_and_offers_nothing(make: Make) -> None:
    caching, plain = make(KINDS[0]), make(KINDS[0], prefix_caching=False)
    serve(plain, "r", PROMPT, 1)
    assert store_of(plain).query(encoded(PROMPT)).hashes == []
    assert run(offered(plain, caching, PROMPT, MigrationId("c"))).end == 0
