"""Copies of prefixes between engines whose output shows every wrong block.

Each test ends with `MigratingCluster.check`: outputs are those of undisturbed runs, and no block, pin, lease
or task is left.
"""

import asyncio
from collections.abc import Callable

import pytest

from migration.errors import RefusalCode
from migration.messages import BlockRun, InstanceId, KvPart, MigrationId
from migration.prefix_messages import (
    PrefixAsk,
    PrefixConfirmed,
    PrefixMessage,
    PrefixOffer,
    PrefixRead,
    PrefixRefused,
)
from migration.prefix_store import PrefixQuery
from pd_serve.simulated_engine.outputs import SimulatedPayload
from tests.unit.migration.migrating_cluster import BLOCK_TOKENS, BOUNDS, COPY_S, MigratingCluster
from tests.virtual_time import in_virtual_time

BLOCKS = 6
PROMPT = BLOCKS * BLOCK_TOKENS + 1
A, B, C = InstanceId("a"), InstanceId("b"), InstanceId("c")


def payload(prompt_tokens: int = PROMPT, seed: int = 0) -> list[bytes]:
    return SimulatedPayload("asked", prompt_tokens, 1, 0, 0, (), seed).encode()


async def copy(cluster: MigratingCluster, holder: InstanceId = A, reader: str = "b", **prompt: int) -> None:
    await cluster[reader].coordinator.prefixes.reader.copy(holder, payload(**prompt))


def num_held(cluster: MigratingCluster, name: str = "b") -> int:
    """Blocks of the prompt in the prefix cache of an instance."""
    batcher = cluster[name].engine.batcher
    sequence = cluster[name].engine._decode(payload())
    return len(batcher.cached(sequence))


async def serve_on_b(cluster: MigratingCluster) -> None:
    await cluster.add("b", PROMPT, 30, "on b")
    await cluster.end("on b")
    await cluster.check()


async def holder_with_prefix(cluster: MigratingCluster) -> None:
    await cluster.fill_prefix_cache("a", PROMPT, 5)


def outcomes(cluster: MigratingCluster) -> dict[str, int]:
    return dict(cluster["b"].coordinator.prefixes.reader.outcomes)


@in_virtual_time
async def test_a_prefix_is_copied_and_used() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await holder_with_prefix(cluster)
        await copy(cluster)
        assert num_held(cluster) == BLOCKS
        reader = cluster["b"].coordinator.prefixes.reader
        assert (outcomes(cluster), reader.tokens_copied) == ({"copied": 1}, BLOCKS * BLOCK_TOKENS)
        assert reader.bytes_copied == BLOCKS * 8
        await serve_on_b(cluster)


@in_virtual_time
async def test_only_what_the_reader_lacks_is_copied() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await holder_with_prefix(cluster)
        await cluster.fill_prefix_cache("b", 2 * BLOCK_TOKENS + 1, 1)
        await copy(cluster)
        assert num_held(cluster) == BLOCKS
        assert cluster["b"].coordinator.prefixes.reader.bytes_copied <= (BLOCKS - 2) * 8
        tokens = cluster["b"].coordinator.prefixes.reader.tokens_copied
        assert 0 < tokens <= (BLOCKS - 2) * BLOCK_TOKENS
        await copy(cluster)
        assert cluster["b"].coordinator.prefixes.reader.bytes_copied <= (BLOCKS - 2) * 8
        assert cluster["b"].coordinator.prefixes.reader.tokens_copied == tokens
        await serve_on_b(cluster)


@in_virtual_time
async def test_blocks_are_read_while_their_request_still_runs() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        await asyncio.gather(copy(cluster), cluster.migrate("a", "b"))
        await serve_on_b(cluster)


@in_virtual_time
async def test_the_holder_evicts_nothing_that_is_read() -> None:
    async with MigratingCluster("a", "b", num_blocks=20) as cluster:
        await holder_with_prefix(cluster)
        cluster.fabric.latency_s = 0.4
        under_way = asyncio.create_task(copy(cluster))
        await asyncio.sleep(0.05)
        await cluster.add("a", 16 * BLOCK_TOKENS, 5, "needs all", seed=9)
        await under_way
        await serve_on_b(cluster)


def lost_ask(cluster: MigratingCluster) -> None:
    cluster.faults.lose(PrefixAsk)


def lost_offer(cluster: MigratingCluster) -> None:
    cluster.faults.lose(PrefixOffer)


def lost_end(cluster: MigratingCluster) -> None:
    cluster.faults.lose(PrefixRead)


def lost_confirmation(cluster: MigratingCluster) -> None:
    cluster.faults.lose(PrefixConfirmed)


def failing_reads(cluster: MigratingCluster) -> None:
    cluster.fabric.fail("a")


def stalled_reads(cluster: MigratingCluster) -> None:
    cluster.fabric.stall("a")


def slow_reservation(cluster: MigratingCluster) -> None:
    """Longer than the lease."""
    cluster["b"].faults.delays_s["reserve_prefix"] = BOUNDS.prefix_lease_s + 0.5


def slow_offer(cluster: MigratingCluster) -> None:
    cluster["a"].faults.delays_s["offer_prefix"] = BOUNDS.prefix_reply_s + 0.5


@pytest.mark.parametrize(
    "fault",
    [
        lost_ask,
        lost_offer,
        lost_end,
        lost_confirmation,
        failing_reads,
        stalled_reads,
        slow_reservation,
        slow_offer,
    ],
)
@in_virtual_time
async def test_whatever_fails_the_prompt_is_computed(fault: Callable[[MigratingCluster], None]) -> None:
    async with MigratingCluster("a", "b") as cluster:
        await holder_with_prefix(cluster)
        fault(cluster)
        began_at = asyncio.get_running_loop().time()
        await copy(cluster)
        bounds = 3 * BOUNDS.prefix_reply_s + BOUNDS.prefix_read_s + BOUNDS.prefix_lease_s
        assert asyncio.get_running_loop().time() - began_at < bounds
        assert num_held(cluster) == 0
        assert "copied" not in outcomes(cluster)
        cluster.fabric.restore("a")
        cluster["a"].faults.delays_s.clear()
        cluster["b"].faults.delays_s.clear()
        cluster.faults.heal()
        await serve_on_b(cluster)


@pytest.mark.parametrize("kind", [PrefixAsk, PrefixOffer, PrefixRead, PrefixConfirmed])
@in_virtual_time
async def test_messages_may_come_twice(kind: type[PrefixMessage]) -> None:
    async with MigratingCluster("a", "b") as cluster:
        await holder_with_prefix(cluster)
        cluster.faults.double(kind)
        cluster.fabric.latency_s = 0.2
        await copy(cluster)
        assert num_held(cluster) == BLOCKS
        await serve_on_b(cluster)


@pytest.mark.parametrize("dies_after_s", [0.0, 0.0015, 0.01, COPY_S + 0.003])
@pytest.mark.parametrize("peers_know", [True, False])
@pytest.mark.parametrize("name", ["a", "b"])
@in_virtual_time
async def test_either_side_may_die(name: str, peers_know: bool, dies_after_s: float) -> None:
    async with MigratingCluster("a", "b", "c") as cluster:
        await holder_with_prefix(cluster)
        under_way = asyncio.create_task(copy(cluster))
        await asyncio.sleep(dies_after_s)
        await cluster.kill(name, peers_know=peers_know)
        if name == "a":
            await under_way
            await serve_on_b(cluster)
        else:
            under_way.cancel()
            await cluster.check()


@in_virtual_time
async def test_a_reader_may_die_before_it_has_an_offer() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await holder_with_prefix(cluster)
        cluster["a"].faults.delays_s["offer_prefix"] = 0.3
        under_way = asyncio.create_task(copy(cluster))
        await asyncio.sleep(0.1)
        await cluster.kill("b", peers_know=True)
        under_way.cancel()
        await asyncio.sleep(0.5)
        await cluster.check()


@in_virtual_time
async def test_what_was_read_after_the_lease_is_not_shared() -> None:
    """A reader that stood still reads blocks that hold something else by then."""
    async with MigratingCluster("a", "b", num_blocks=24) as cluster:
        await holder_with_prefix(cluster)
        cluster["b"].faults.delays_s["reserve_prefix"] = BOUNDS.prefix_lease_s + 0.5
        under_way = asyncio.create_task(copy(cluster))
        await asyncio.sleep(BOUNDS.prefix_lease_s + 0.1)
        await cluster.fill_prefix_cache("a", 20 * BLOCK_TOKENS, 2, seed=5)
        await under_way
        assert outcomes(cluster) == {RefusalCode.TIMED_OUT: 1}
        assert num_held(cluster) == 0
        await serve_on_b(cluster)


@in_virtual_time
async def test_a_holder_without_the_prefix_refuses_at_once() -> None:
    async with MigratingCluster("a", "b") as cluster:
        began_at = asyncio.get_running_loop().time()
        await copy(cluster)
        assert asyncio.get_running_loop().time() - began_at < 0.1
        assert outcomes(cluster) == {RefusalCode.NOT_HERE: 1}
        await serve_on_b(cluster)


@in_virtual_time
async def test_nothing_is_asked_of_itself_or_of_an_unknown_instance() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await copy(cluster, holder=B)
        assert not cluster.sent
        await copy(cluster, holder=InstanceId("gone"))
        assert outcomes(cluster) == {RefusalCode.PEER_LOST: 1}
        await serve_on_b(cluster)


@in_virtual_time
async def test_a_full_reader_computes_instead() -> None:
    async with MigratingCluster("a", "b", num_blocks=16) as cluster:
        await holder_with_prefix(cluster)
        await cluster.add("b", 11 * BLOCK_TOKENS, 8, "fills", seed=3)
        await cluster.tokens(1, "fills")
        await copy(cluster)
        assert outcomes(cluster) == {RefusalCode.NO_FREE_BLOCKS: 1}
        await serve_on_b(cluster)


@in_virtual_time
async def test_a_holder_serves_only_so_many_readers() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await holder_with_prefix(cluster)
        cluster.fabric.latency_s = 0.3
        most = BOUNDS.max_prefix_leases
        await asyncio.gather(*(copy(cluster) for _ in range(most + 3)))
        assert outcomes(cluster) == {"copied": most, RefusalCode.TOO_MANY_MIGRATIONS: 3}
        await serve_on_b(cluster)


@pytest.mark.parametrize(
    "part",
    [
        KvPart(BLOCK_TOKENS, []),
        KvPart(BLOCK_TOKENS, [BlockRun(0, [])]),
        KvPart(BLOCK_TOKENS, [BlockRun(2, [1])]),
        KvPart(BLOCK_TOKENS, [BlockRun(0, [1]), BlockRun(0, [1])]),
        KvPart(2 * PROMPT, [BlockRun(0, [1] * (2 * PROMPT // BLOCK_TOKENS))]),
        KvPart(-BLOCK_TOKENS, [BlockRun(0, [])]),
    ],
    ids=str,
)
@in_virtual_time
async def test_an_offer_that_does_not_fit_changes_nothing(part: KvPart) -> None:
    async with MigratingCluster("a", "b") as cluster:
        await holder_with_prefix(cluster)
        cluster.faults.hold(PrefixAsk)
        under_way = asyncio.create_task(copy(cluster))
        await asyncio.sleep(0.1)
        copies = cluster["b"].coordinator.prefixes
        (copy_id,) = copies.reader._copies
        copies.on_message(A, PrefixOffer(copy_id, part, cluster.fabric.transport("a").endpoint()))
        await under_way
        assert "copied" not in outcomes(cluster)
        cluster.faults.heal()
        await serve_on_b(cluster)


@in_virtual_time
async def test_messages_of_others_have_no_part_in_a_copy() -> None:
    """A third instance can neither end a lease nor confirm a copy that is not its own."""
    async with MigratingCluster("a", "b", "c") as cluster:
        await holder_with_prefix(cluster)
        cluster.fabric.latency_s = 0.2
        under_way = asyncio.create_task(copy(cluster))
        await asyncio.sleep(0.05)
        (copy_id,) = cluster["b"].coordinator.prefixes.reader._copies
        cluster["a"].coordinator.on_message(C, PrefixRead(copy_id))
        cluster["b"].coordinator.on_message(C, PrefixConfirmed(copy_id))
        cluster["b"].coordinator.on_message(A, PrefixConfirmed(MigrationId("unknown")))
        await under_way
        assert num_held(cluster) == BLOCKS
        await serve_on_b(cluster)


@in_virtual_time
async def test_blocks_of_a_failed_read_are_not_used_while_it_may_still_write() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await holder_with_prefix(cluster)
        cluster.fabric.quarantine_s = 3.0
        cluster.fabric.latency_s = 0.2
        under_way = asyncio.create_task(copy(cluster))
        await asyncio.sleep(0.1)
        cluster.fabric.fail("a")
        await under_way
        assert len(cluster["b"].engine.prefixes.held_blocks) == BLOCKS
        await asyncio.sleep(3.5)
        assert not cluster["b"].engine.prefixes.held_blocks
        await serve_on_b(cluster)


@pytest.mark.parametrize("max_tokens", [-1, -(10**9), 0, 1, 10**12])
@pytest.mark.parametrize("hashes", [[], [b""], [b"nonsense"], [b"x" * 40] * 3])
@in_virtual_time
async def test_a_question_of_nonsense_is_refused(hashes: list[bytes], max_tokens: int) -> None:
    async with MigratingCluster("a", "b") as cluster:
        await holder_with_prefix(cluster)
        store, compatibility = cluster["a"].engine.prefixes, cluster["a"].engine._migrations.compatibility
        offer = store.offer

        async def strict_offer(copy_id: MigrationId, query: PrefixQuery) -> KvPart:
            assert query.max_tokens > 0, "vLLM's lookup raises, which would end the instance"
            return await offer(copy_id, query)

        store.offer = strict_offer  # type: ignore[method-assign]
        copy_id = MigrationId("b.made.up")
        cluster["a"].coordinator.on_message(B, PrefixAsk(copy_id, hashes, max_tokens, compatibility))
        await asyncio.sleep(0.1)
        assert [m.copy_id for m in cluster.sent if isinstance(m, PrefixRefused)] == [copy_id]
        await copy(cluster)
        assert num_held(cluster) == BLOCKS
        await serve_on_b(cluster)


@pytest.mark.parametrize("block_id", [-2, 10**6])
@in_virtual_time
async def test_blocks_that_no_engine_has_are_not_copied(block_id: int) -> None:
    async with MigratingCluster("a", "b") as cluster:
        await holder_with_prefix(cluster)
        offer = cluster["a"].engine.prefixes.offer

        async def lying_offer(copy_id: MigrationId, query: PrefixQuery) -> KvPart:
            part = await offer(copy_id, query)
            (run,) = part.runs
            return KvPart(part.end, [BlockRun(0, [block_id, *run.block_ids[1:]])])

        cluster["a"].engine.prefixes.offer = lying_offer  # type: ignore[method-assign]
        await copy(cluster)
        assert "copied" not in outcomes(cluster)
        assert num_held(cluster) == 0
        await serve_on_b(cluster)


@in_virtual_time
async def test_an_unforeseen_failure_of_a_copy_does_not_fail_its_request() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await holder_with_prefix(cluster)

        async def read(*arguments: object) -> int:
            raise IndexError("unforeseen")

        transport = cluster["b"].coordinator._instance.transport
        transport.read = read  # type: ignore[assignment, method-assign]
        await copy(cluster)
        assert outcomes(cluster) == {RefusalCode.COPY_FAILED: 1}
        await serve_on_b(cluster)
