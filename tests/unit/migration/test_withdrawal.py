"""What a destination reads keeps its contents, and what it has read is shared only when it was whole.

The source's blocks are few, so that a freed block is written by another request soon.
"""

import asyncio
from dataclasses import replace

import pytest

from migration.destination_table import DestinationState as DS
from migration.messages import (
    Confirmed,
    Dropped,
    Final,
    InstanceId,
    RequestId,
    Withdraw,
)
from migration.record import MigrationRecord
from migration.source_table import SourceState as SS
from tests.unit.migration.migrating_cluster import BLOCK_TOKENS, BOUNDS, MigratingCluster
from tests.virtual_time import in_virtual_time

PROMPT = 5  # tokens: a full block, which others with this prompt share
A, B = InstanceId("a"), InstanceId("b")
GIVEN_UP_S = (BOUNDS.questions + 1) * BOUNDS.acknowledge_s


def pins(cluster: MigratingCluster, name: str = "a") -> int:
    """The number of pinned blocks of an instance."""
    return sum(map(len, cluster[name].engine._migrations.pinned.values()))


async def tail(cluster: MigratingCluster) -> None:
    """r is suspended, and all its blocks are being copied, which takes 0.3 s."""
    await cluster.add("a", PROMPT, 60)
    await cluster.tokens(1)
    cluster.fabric.latency_s = 0.3
    cluster.start_migration("a", "b", blocking=True)
    await cluster.until(SS.SUSPENDED, DS.TAIL)


async def fill(cluster: MigratingCluster) -> None:
    """Another request takes all free blocks of the source, and writes them."""
    free = cluster["a"].engine.batcher.pool.num_free
    await cluster.add("a", free * BLOCK_TOKENS - 1, 1, request_id="filler", seed=99)
    await cluster.end("filler")


async def same_beginning(cluster: MigratingCluster, name: str = "b") -> None:
    """A request with the prompt of r, which would share its blocks."""
    await cluster.add(name, PROMPT, 20, request_id="same")


@in_virtual_time
async def test_blocks_that_are_read_are_not_used_again_when_their_request_is_aborted() -> None:
    """The abort overtakes the withdrawal, which is lost."""
    async with MigratingCluster("a", "b", num_blocks=24) as cluster:
        await tail(cluster)
        cluster.faults.lose(Withdraw)
        cluster.abort()
        await asyncio.sleep(0.05)
        assert pins(cluster)
        await fill(cluster)
        await asyncio.sleep(0.3)
        await same_beginning(cluster)
        cluster.faults.heal()
        await cluster.check()
        assert not pins(cluster)


@in_virtual_time
async def test_blocks_that_are_read_are_not_used_again_when_their_request_is_preempted() -> None:
    async with MigratingCluster("a", "b", num_blocks=24) as cluster:
        await cluster.add("a", 3 * PROMPT, 60)
        await cluster.tokens(3)
        cluster.fabric.latency_s = 0.3
        cluster.start_migration("a", "b")
        await cluster.until(SS.STAGING, DS.COPYING)
        content, pinned = cluster["a"].engine.batcher.pool.content, cluster["a"].engine._migrations.pinned
        (blocks,) = pinned.values()
        before = [content[block] for block in blocks]
        cluster["a"].engine.preempt(RequestId("r"))
        await fill(cluster)
        assert [content[block] for block in blocks] == before
        await cluster.check()


@in_virtual_time
async def test_pins_end_with_the_answer_to_the_withdrawal() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await tail(cluster)
        cluster.faults.hold(Dropped)
        cluster.abort()
        await asyncio.sleep(0.05)
        problems = " ".join(await cluster.problems())
        assert "blocks are pinned for a." in problems
        assert "is withdrawn and not answered" in problems
        cluster.faults.release()
        await asyncio.sleep(0.05)
        assert not pins(cluster)
        assert cluster["a"].coordinator.check_integrity() == []
        await cluster.check()


@pytest.mark.parametrize("lost", [Withdraw, Dropped])
@in_virtual_time
async def test_a_withdrawal_is_repeated_until_it_is_answered(lost: type) -> None:
    """A destination that has forgotten the migration answers, too."""
    async with MigratingCluster("a", "b") as cluster:
        await tail(cluster)
        cluster.faults.lose(lost, times=2)
        cluster.abort()
        await asyncio.sleep(3.5 * BOUNDS.acknowledge_s)
        assert not pins(cluster)
        assert cluster["a"].coordinator.check_integrity() == []
        await cluster.check()


@in_virtual_time
async def test_pins_end_when_the_destination_never_answers() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await tail(cluster)
        cluster.faults.isolate(A, B)
        cluster.abort()
        await asyncio.sleep(GIVEN_UP_S - 0.2)
        assert pins(cluster)
        await asyncio.sleep(0.4)
        assert not pins(cluster)
        cluster.faults.heal()
        await cluster.check()


@in_virtual_time
async def test_pins_end_with_the_death_of_the_destination() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await tail(cluster)
        cluster.faults.lose(Withdraw)
        cluster.abort()
        await asyncio.sleep(0.05)
        assert pins(cluster)
        await cluster.kill("b", peers_know=True)
        await asyncio.sleep(0.05)
        assert not pins(cluster)
        await cluster.check()


@in_virtual_time
async def test_blocks_that_were_read_too_late_are_never_shared() -> None:
    """The source has waited for its bound; what it had offered holds other things by now."""
    async with MigratingCluster("a", "b", num_blocks=24) as cluster:
        await tail(cluster)
        cluster.faults.lose(Withdraw)
        cluster.fabric.stall("a")
        (incoming,) = cluster["b"].coordinator._incoming.values()
        incoming._timer.set(None)  # this process stands still, too
        cluster.abort()
        await asyncio.sleep(2 * GIVEN_UP_S)
        assert not pins(cluster)
        await fill(cluster)
        cluster.fabric.restore("a")
        await asyncio.sleep(0.5)
        await same_beginning(cluster)
        cluster.faults.heal()
        await cluster.check()


@in_virtual_time
async def test_a_tail_that_was_read_too_late_is_not_committed() -> None:
    async with MigratingCluster("a", "b", bounds=replace(BOUNDS, questions=50)) as cluster:
        await tail(cluster)
        cluster.fabric.stall("a")
        (incoming,) = cluster["b"].coordinator._incoming.values()
        incoming._timer.set(None)  # as after a suspension of this process: not served yet
        await asyncio.sleep(1.1 * BOUNDS.tail_s)
        cluster.fabric.restore("a")
        await cluster.check()
        (record,) = cluster["a"].records
        assert record.why == "dropped by the destination: the last blocks were read too late"


@in_virtual_time
async def test_moved_blocks_are_shared_when_the_source_has_confirmed_them() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        cluster.faults.hold(Confirmed)
        record = await cluster.migrate("a", "b")
        assert isinstance(record, MigrationRecord)
        assert record.committed
        await asyncio.sleep(0.05)
        pool = cluster["b"].engine.batcher.pool
        assert not pool._hash_of
        cluster.faults.release()
        await asyncio.sleep(0.05)
        assert len(pool._hash_of) >= PROMPT // BLOCK_TOKENS
        await same_beginning(cluster)
        await cluster.check()


@in_virtual_time
async def test_moved_blocks_are_not_shared_when_the_confirmation_is_lost() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        cluster.faults.lose(Confirmed)
        await cluster.migrate("a", "b")
        await cluster.end()
        assert not cluster["b"].engine.batcher.pool._hash_of
        await cluster.check()


@in_virtual_time
async def test_a_request_that_is_preempted_before_its_confirmation_is_computed_and_shared_again() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        cluster.faults.hold(Confirmed)
        await cluster.migrate("a", "b")
        cluster["b"].engine.preempt(RequestId("r"))
        await asyncio.sleep(0.1)
        cluster.faults.release()
        await same_beginning(cluster)
        await cluster.check()


@in_virtual_time
async def test_messages_of_another_instance_change_nothing() -> None:
    async with MigratingCluster("a", "b", "c") as cluster:
        await tail(cluster)
        (final,) = [message for message in cluster.sent if isinstance(message, Final)]
        cluster["b"].coordinator.on_message(InstanceId("c"), Withdraw(final.migration_id, None))  # type: ignore[arg-type]
        cluster["a"].coordinator.on_message(InstanceId("c"), Dropped(final.migration_id, None))  # type: ignore[arg-type]
        assert cluster.states("a", "b") == (SS.SUSPENDED, DS.TAIL)
        await cluster.check()
        assert cluster["a"].records[0].committed
