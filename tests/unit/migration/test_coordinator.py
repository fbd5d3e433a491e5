"""Coordinators, drivers and the local transport between engines whose output shows every wrong block.

Each test ends with `MigratingCluster.check`: the output is that of an undisturbed run, each token once, and
no block, slot, table entry, timer or task is left.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from migration.destination_table import DestinationState as DS
from migration.engine_rules import blocks_for
from migration.errors import Refusal, RefusalCode
from migration.messages import (
    Committed,
    Dropped,
    Final,
    InstanceId,
    KeepAlive,
    KvPart,
    MigrationMessage,
    Offer,
    Pull,
    Query,
    Refused,
    RequestId,
    Stage,
    Withdraw,
)
from migration.record import MigrationRecord
from migration.source_table import SourceState as SS
from tests.unit.migration.migrating_cluster import BLOCK_TOKENS, BOUNDS, MigratingCluster
from tests.virtual_time import in_virtual_time

PROMPT = 13  # tokens
Scene = Callable[[MigratingCluster], Awaitable[None]]
A, B = InstanceId("a"), InstanceId("b")


async def moved(cluster: MigratingCluster, source: str = "a", destination: str = "b") -> MigrationRecord:
    outcome = await cluster.migrate(source, destination)
    assert isinstance(outcome, MigrationRecord)
    assert outcome.committed, outcome.why
    return outcome


async def not_moved(cluster: MigratingCluster, source: str = "a", destination: str = "b") -> Refusal:
    outcome = await cluster.migrate(source, destination)
    if isinstance(outcome, Refusal):
        return outcome
    assert outcome.refusal is not None
    return outcome.refusal


class TestUndisturbed:
    @pytest.mark.parametrize("async_scheduling", [False, True])
    @in_virtual_time
    async def test_a_request_moves_while_it_decodes(self, async_scheduling: bool) -> None:
        async with MigratingCluster("a", "b", async_scheduling=async_scheduling) as cluster:
            await cluster.add("a", PROMPT, 40)
            await cluster.tokens(5)
            outcome = await moved(cluster)
            assert outcome.stages >= 2
            assert outcome.tokens == PROMPT + len(cluster.routes["r"].ledger.token_ids) - 1
            assert outcome.blocks == blocks_for(outcome.tokens, BLOCK_TOKENS)
            assert cluster.routes["r"].ledger.owner == "a"
            await cluster.check()
            assert cluster.routes["r"].ledger.owner == "b"
            assert cluster.routes["r"].ledger.num_moves == 1
            assert cluster.routes["r"].recomputes == 0

    @in_virtual_time
    async def test_a_blocking_migration_copies_everything_in_one_stage(self) -> None:
        async with MigratingCluster("a", "b") as cluster:
            await cluster.add("a", PROMPT, 40)
            await cluster.tokens(5)
            outcome = await cluster["a"].coordinator.migrate(RequestId("r"), B, "test", blocking=True)
            assert outcome.committed
            assert outcome.stages == 1
            await cluster.check()

    @in_virtual_time
    async def test_blocks_that_a_prefix_cache_has_are_not_copied(self) -> None:
        async with MigratingCluster("a", "b") as cluster:
            await cluster.fill_prefix_cache("b", PROMPT, 1)
            await cluster.add("a", PROMPT, 40)
            await cluster.tokens(5)
            outcome = await moved(cluster)
            assert outcome.blocks == blocks_for(outcome.tokens, BLOCK_TOKENS) - 3
            await cluster.check()

    @in_virtual_time
    async def test_a_request_returns_to_the_instance_it_has_just_left(self) -> None:
        """A request comes back to the instance that it has just left, again and again."""
        async with MigratingCluster("a", "b", async_scheduling=True) as cluster:
            await cluster.add("a", PROMPT, 120)
            await cluster.tokens(1)
            for _ in range(5):
                await moved(cluster, "a", "b")
                await moved(cluster, "b", "a")
            assert len(cluster.routes["r"].ledger.token_ids) < 120
            await cluster.check()
            assert cluster.routes["r"].ledger.epoch == 10

    @in_virtual_time
    async def test_eight_requests_move_at_once(self) -> None:
        async with MigratingCluster("a", "b", num_blocks=256, chunk_tokens=32) as cluster:
            for number in range(8):
                await cluster.add("a", PROMPT + 1, 30 + number, request_id=f"r{number}", seed=number)
            await cluster.tokens(3, "r7")
            outcomes = await asyncio.gather(*(cluster.migrate("a", "b", f"r{i}") for i in range(8)))
            assert all(isinstance(o, MigrationRecord) and o.committed for o in outcomes)
            assert cluster["a"].coordinator.num_outgoing == cluster["b"].coordinator.num_incoming == 0
            await cluster.check()

    @in_virtual_time
    async def test_requests_move_in_both_directions_at_once(self) -> None:
        async with MigratingCluster("a", "b") as cluster:
            await cluster.add("a", PROMPT, 40, request_id="there")
            await cluster.add("b", PROMPT, 50, request_id="back")
            await cluster.tokens(3, "back")
            await cluster.tokens(3, "there")
            outcomes = await asyncio.gather(
                cluster.migrate("a", "b", "there"), cluster.migrate("b", "a", "back")
            )
            assert all(isinstance(o, MigrationRecord) and o.committed for o in outcomes)
            await cluster.check()

    @pytest.mark.parametrize("async_scheduling", [False, True])
    @in_virtual_time
    async def test_a_hand_off_copies_during_a_chunked_prefill(self, async_scheduling: bool) -> None:
        """Stages move while the prompt is being computed; the first token comes from the source."""
        prompt = PROMPT * 8
        async with MigratingCluster("a", "b", async_scheduling=async_scheduling) as cluster:
            await cluster.add("a", prompt, 20, handoff=True)
            await cluster.until(SS.STAGING, DS.COPYING)
            assert not cluster.routes["r"].ledger.token_ids
            await cluster.check()
            (outcome,) = cluster["a"].records
            assert outcome.committed
            assert outcome.stages > 3
            assert outcome.tokens < prompt + 3 * BLOCK_TOKENS
            assert cluster.routes["r"].ledger.owner == "b"

    @in_virtual_time
    async def test_a_long_prefill_keeps_the_reservation_alive(self) -> None:
        """The destination has all of the prompt in its prefix cache, so nothing can be staged for long."""
        prompt = PROMPT * 16
        bounds = replace(BOUNDS, lease_s=0.25)
        async with MigratingCluster("a", "b", num_blocks=128, bounds=bounds) as cluster:
            await cluster.fill_prefix_cache("b", prompt, 1)
            cluster.faults.double(Pull)
            await cluster.add("a", prompt, 20, handoff=True)
            await cluster.check()
            assert cluster["a"].records[0].committed
            assert any(isinstance(message, KeepAlive) for message in cluster.sent)

    @in_virtual_time
    async def test_a_request_that_outruns_its_copy_is_suspended_after_the_last_stage(self) -> None:
        """Copying takes as long as decoding: after so many stages the rest is copied at once."""
        async with MigratingCluster("a", "b", bounds=replace(BOUNDS, max_stages=3)) as cluster:
            cluster.fabric.latency_s = 0.15
            await cluster.add("a", PROMPT, 150)
            await cluster.tokens(5)
            outcome = await moved(cluster)
            assert outcome.stages == 4
            await cluster.check()


class TestRefused:
    @in_virtual_time
    async def test_a_refused_migration_has_the_reason(self) -> None:
        async with MigratingCluster("a", "b") as cluster:
            differs = Refusal(RefusalCode.INCOMPATIBLE, "the model differs")
            cluster["b"].faults.always_refused["reserve"] = differs
            await cluster.add("a", PROMPT, 20)
            await cluster.tokens(2)
            assert await not_moved(cluster) == differs.prefixed("refused")
            assert cluster.states("a", "b") == (None, None)
            await cluster.check()

    @in_virtual_time
    async def test_a_destination_without_free_blocks_refuses(self) -> None:
        async with MigratingCluster("a", "b", num_blocks=12) as cluster:
            await cluster.add("b", PROMPT * 2, 20, request_id="large", seed=1)
            await cluster.add("a", PROMPT, 30)
            await cluster.tokens(2)
            await cluster.tokens(2, "large")
            assert (await not_moved(cluster)).code is RefusalCode.NO_FREE_BLOCKS
            await cluster.check()

    @in_virtual_time
    async def test_arrivals_above_the_limit_are_refused(self) -> None:
        bounds = replace(BOUNDS, max_incoming=2)
        async with MigratingCluster("a", "b", num_blocks=128, bounds=bounds) as cluster:
            for number in range(4):
                await cluster.add("a", PROMPT + 1, 40, request_id=f"r{number}", seed=number)
            await cluster.tokens(2, "r3")
            outcomes = await asyncio.gather(*(cluster.migrate("a", "b", f"r{i}") for i in range(4)))
            why = sorted(o.why for o in outcomes if isinstance(o, MigrationRecord))
            assert why == ["", "", *["refused: 2 migrations are arriving already"] * 2]
            await cluster.check()

    @in_virtual_time
    async def test_departures_above_the_limit_are_refused(self) -> None:
        bounds = replace(BOUNDS, max_outgoing=2)
        async with MigratingCluster("a", "b", num_blocks=128, bounds=bounds) as cluster:
            for number in range(4):
                await cluster.add("a", PROMPT + 1, 40, request_id=f"r{number}", seed=number)
            await cluster.tokens(2, "r3")
            outcomes = await asyncio.gather(*(cluster.migrate("a", "b", f"r{i}") for i in range(4)))
            full = Refusal(RefusalCode.TOO_MANY_MIGRATIONS, "2 migrations are leaving already")
            assert [o for o in outcomes if isinstance(o, Refusal)] == [full, full]
            await cluster.check()

    @in_virtual_time
    async def test_a_migration_that_cannot_begin_is_refused_at_the_source(self) -> None:
        async with MigratingCluster("a", "b", "c") as cluster:
            await cluster.add("a", PROMPT, 40)
            await cluster.tokens(2)
            assert (await not_moved(cluster, "a", "a")).text == "the request is on a already"
            assert (await not_moved(cluster, "b", "a")).text == "the request is not here"
            under_way = cluster.start_migration("a", "b")
            await cluster.until(SS.STAGING, DS.COPYING)
            assert (await not_moved(cluster, "a", "c")).code is RefusalCode.ALREADY_MIGRATING
            assert isinstance(outcome := await under_way, MigrationRecord)
            assert outcome.committed
            await cluster.check()


# ---- every phase against every disaster


async def offered(cluster: MigratingCluster) -> None:
    cluster.faults.hold(Pull)
    cluster.start_migration("a", "b")
    await cluster.until(SS.OFFERED, DS.WAITING)


async def reserving(cluster: MigratingCluster) -> None:
    cluster["b"].faults.delays_s["reserve"] = 0.5
    cluster.start_migration("a", "b")
    await cluster.until(SS.OFFERED, DS.RESERVING)


async def advancing(cluster: MigratingCluster) -> None:
    """The destination has all blocks in its prefix cache; see `enter`."""
    await cluster.tokens(BLOCK_TOKENS)
    cluster.start_migration("a", "b")
    await cluster.until(SS.ADVANCING, DS.WAITING)


async def staging(cluster: MigratingCluster) -> None:
    cluster.fabric.latency_s = 0.1
    cluster.start_migration("a", "b")
    await cluster.until(SS.STAGING, DS.COPYING)


async def suspended(cluster: MigratingCluster) -> None:
    cluster.faults.hold(Final)
    cluster.start_migration("a", "b")
    await cluster.until(SS.SUSPENDED, DS.WAITING)


async def tail(cluster: MigratingCluster) -> None:
    cluster.start_migration("a", "b")
    await cluster.until(SS.SUSPENDED, DS.TAIL)


async def committing(cluster: MigratingCluster) -> None:
    cluster["b"].faults.delays_s["commit"] = 0.1
    cluster.start_migration("a", "b")
    await cluster.until(SS.SUSPENDED, DS.COMMITTING)


async def committed(cluster: MigratingCluster) -> None:
    cluster.faults.hold(Committed)
    cluster.start_migration("a", "b")
    await cluster.until(SS.SUSPENDED, DS.COMMITTED)


async def releasing(cluster: MigratingCluster) -> None:
    cluster["a"].faults.delays_s["release"] = 0.1
    cluster.start_migration("a", "b")
    await cluster.until(SS.RELEASING, DS.COMMITTED)


async def enter(phase: Scene, cluster: MigratingCluster, max_tokens: int) -> None:
    """A request of three tokens at least on `a`, and its migration to `b` in this phase."""
    if phase is advancing:
        await cluster.fill_prefix_cache("b", PROMPT, max_tokens)
    await cluster.add("a", PROMPT, max_tokens)
    await cluster.tokens(3)
    await phase(cluster)


PHASES = [offered, reserving, advancing, staging, suspended, tail, committing, committed, releasing]
RUNNING_PHASES = [offered, reserving, advancing, staging]


async def nothing(cluster: MigratingCluster) -> None:
    """The phases themselves hold messages back and slow things down."""


async def client_leaves(cluster: MigratingCluster) -> None:
    cluster.abort()


async def preempted(cluster: MigratingCluster) -> None:
    cluster["a"].engine.preempt(RequestId("r"))


async def cancelled(cluster: MigratingCluster) -> None:
    cluster["a"].coordinator.cancel(RequestId("r"), "changed its mind")


async def destination_dies(cluster: MigratingCluster) -> None:
    await cluster.kill("b", peers_know=True)


async def destination_dies_in_silence(cluster: MigratingCluster) -> None:
    await cluster.kill("b", peers_know=False)


async def source_dies(cluster: MigratingCluster) -> None:
    await cluster.kill("a", peers_know=True)


async def source_dies_in_silence(cluster: MigratingCluster) -> None:
    await cluster.kill("a", peers_know=False)


async def peers_part(cluster: MigratingCluster) -> None:
    """Scenario: neither hears the other for longer than all bounds; the front end hears both."""
    cluster.faults.isolate(A, B)
    await asyncio.sleep(10)
    cluster.faults.heal()


async def peer_is_thought_dead(cluster: MigratingCluster) -> None:
    """Scenario: a wrong membership list; both live on."""
    cluster["a"].coordinator.peer_lost(B)
    cluster["b"].coordinator.peer_lost(A)


async def copies_fail(cluster: MigratingCluster) -> None:
    cluster.fabric.fail("a")
    await asyncio.sleep(1)
    cluster.fabric.restore("a")


async def copies_stall(cluster: MigratingCluster) -> None:
    """Longer than every bound of a copy, and of the questions about it."""
    cluster.fabric.stall("a")
    await asyncio.sleep(5)
    cluster.fabric.restore("a")


async def destination_is_full(cluster: MigratingCluster) -> None:
    pool = cluster["b"].engine.batcher.pool
    taken = pool.allocate(pool.num_free)
    await asyncio.sleep(1)
    pool.release(taken)
    await cluster["b"].engine.live_requests()  # an idle engine looks again


async def commit_fails(cluster: MigratingCluster) -> None:
    cluster["b"].faults.refuse_next("commit", Refusal(RefusalCode.NO_FREE_BLOCKS, "no 3 more free KV blocks"))


DISASTERS = [
    nothing,
    client_leaves,
    preempted,
    cancelled,
    destination_dies,
    destination_dies_in_silence,
    source_dies,
    source_dies_in_silence,
    peers_part,
    peer_is_thought_dead,
    copies_fail,
    copies_stall,
    destination_is_full,
    commit_fails,
]


@pytest.mark.parametrize("disaster", DISASTERS)
@pytest.mark.parametrize("phase", PHASES)
@in_virtual_time
async def test_the_output_survives_every_disaster_in_every_phase(phase: Scene, disaster: Scene) -> None:
    async with MigratingCluster("a", "b", "c") as cluster:
        await enter(phase, cluster, 60)
        await disaster(cluster)
        cluster.faults.release()
        await cluster.check()


@pytest.mark.parametrize("disaster", DISASTERS)
@pytest.mark.parametrize("state", [SS.OFFERED, SS.ADVANCING])
@pytest.mark.parametrize("async_scheduling", [False, True])
@in_virtual_time
async def test_the_output_survives_every_disaster_during_its_first_step(
    async_scheduling: bool, state: SS, disaster: Scene
) -> None:
    """It has been offered with its beginning, and the destination has reserved."""
    async with MigratingCluster("a", "b", "c", async_scheduling=async_scheduling) as cluster:
        if state is SS.OFFERED:
            cluster.faults.hold(Pull)
        await cluster.add("a", PROMPT, 60, handoff=True)
        await cluster.until(state, DS.WAITING)
        assert not cluster.routes["r"].ledger.token_ids
        await disaster(cluster)
        cluster.faults.release()
        await cluster.check()


@pytest.mark.parametrize("tokens", [1, 7])
@in_virtual_time
async def test_a_request_that_was_recomputed_before_its_offer_leaves_moves_as_it_is(tokens: int) -> None:
    """The offer describes an earlier copy of the same id, on the same instance."""
    async with MigratingCluster("a", "b", "c") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(1)
        description = await cluster["a"].engine.describe(RequestId("r"))
        await cluster.tokens(tokens)
        cluster._recompute(cluster.routes["r"])
        await cluster.tokens(tokens + 2)
        outcome = await cluster.migrate("a", "b", description=description)
        assert isinstance(outcome, MigrationRecord)
        assert outcome.committed
        await cluster.check()


@in_virtual_time
async def test_a_request_that_has_ended_before_its_offer_leaves_does_not_move() -> None:
    """Its description is from before its end."""
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(2)
        description = await cluster["a"].engine.describe(RequestId("r"))
        cluster.abort()
        await cluster.end()
        outcome = await cluster.migrate("a", "b", description=description)
        assert isinstance(outcome, MigrationRecord)
        assert outcome.refusal is not None
        assert outcome.refusal.code is RefusalCode.FINISHED
        await cluster.check()


@pytest.mark.parametrize("disaster", [copies_fail, copies_stall, cancelled, client_leaves, source_dies])
@pytest.mark.parametrize("phase", PHASES)
@in_virtual_time
async def test_the_output_survives_while_blocks_are_in_quarantine(phase: Scene, disaster: Scene) -> None:
    async with MigratingCluster("a", "b", "c") as cluster:
        cluster.fabric.quarantine_s = 3.0
        await enter(phase, cluster, 60)
        await disaster(cluster)
        cluster.faults.release()
        await cluster.end()
        await asyncio.sleep(4)
        await cluster.check()


@in_virtual_time
async def test_blocks_of_a_migration_under_way_violate_nothing() -> None:
    """The copy of a long prompt takes longer than a check of the integrity."""
    async with MigratingCluster("a", "b") as cluster:
        source = cluster["a"]
        await enter(tail, cluster, 200)
        (under_way,) = source.coordinator.under_way
        (problem,) = await source.engine.check_integrity()
        assert problem.endswith(f"blocks are pinned for {under_way}")
        assert await source.engine.check_integrity(source.coordinator.under_way) == []
        cluster.faults.release()
        await cluster.end()
        assert source.coordinator.under_way == set()
        await cluster.check()


@in_virtual_time
async def test_blocks_of_a_failed_read_are_kept_while_the_request_goes_on() -> None:
    async with MigratingCluster("a", "b") as cluster:
        cluster.fabric.quarantine_s = 5.0
        pool = cluster["b"].engine.batcher.pool
        free = pool.num_free
        await enter(tail, cluster, 200)
        cluster.fabric.fail("a")
        await asyncio.sleep(0.2)
        assert cluster["a"].records[-1].refusal, "the migration has ended"
        seen = len(cluster.routes["r"].ledger.token_ids)
        await asyncio.sleep(0.2)
        assert len(cluster.routes["r"].ledger.token_ids) > seen
        assert pool.num_free < free
        (problem,) = cluster["b"].coordinator.check_integrity()
        assert "until no failed read writes to them" in problem
        await asyncio.sleep(5)
        assert pool.num_free == free
        await cluster.check()


@pytest.mark.parametrize("phase", RUNNING_PHASES)
@pytest.mark.parametrize("async_scheduling", [False, True])
@in_virtual_time
async def test_a_request_may_finish_at_its_source_in_every_phase(
    phase: Scene, async_scheduling: bool
) -> None:
    async with MigratingCluster("a", "b", async_scheduling=async_scheduling) as cluster:
        await enter(phase, cluster, 60)
        sequence = cluster["a"].engine.sequences["r"]
        sequence.max_tokens = len(sequence.output) + 1
        await cluster.end()
        cluster.faults.release()
        route = cluster.routes["r"]
        assert len(route.ledger.token_ids) < 40
        route.aborted = True  # a prefix of the whole output is right
        await cluster.check()


@in_virtual_time
async def test_a_suspended_request_may_finish_with_its_step_in_flight() -> None:
    """Suspended at a step boundary, and the step in flight brings the last token."""
    for tokens in range(8, 20):
        async with MigratingCluster("a", "b", async_scheduling=True) as cluster:
            await cluster.add("a", PROMPT, tokens)
            await cluster.tokens(3)
            await cluster.migrate("a", "b")
            await cluster.check()


@pytest.mark.parametrize("phase", PHASES)
@in_virtual_time
async def test_every_wait_has_a_bound(phase: Scene) -> None:
    """Neither ever hears the other again: both sides end by themselves, long before the request does."""
    async with MigratingCluster("a", "b") as cluster:
        await enter(phase, cluster, 100)
        cluster.steps.step_s = 1.0
        cluster.faults.isolate(A, B)
        await asyncio.sleep(
            BOUNDS.copy_s + 2 * BOUNDS.lease_s + 2 * (BOUNDS.questions + 1) * BOUNDS.acknowledge_s + 4.0
        )
        assert cluster.states("a", "b") in ((None, None), (None, DS.COMMITTED))
        assert not cluster.routes["r"].ended.is_set()
        cluster.steps.step_s = 0.01
        await cluster.check()


@in_virtual_time
async def test_a_destination_answers_a_final_state_that_it_does_not_know() -> None:
    """It has dropped the reservation and this word was lost: the final state is answered all the same."""
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        await suspended(cluster)
        cluster.faults.lose(Dropped, times=1)
        cluster["b"].coordinator.peer_lost(A)
        await cluster.until(SS.SUSPENDED, None)
        cluster.faults.release()
        await asyncio.sleep(2 * BOUNDS.acknowledge_s)
        (outcome,) = cluster["a"].records
        assert outcome.why == "dropped by the destination: unknown here"
        await cluster.check()


@in_virtual_time
async def test_the_connection_to_a_dead_peer_is_dropped() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        await moved(cluster)
        forgotten: list[str] = []
        cluster["b"].coordinator._instance.transport.forget = forgotten.append  # type: ignore[method-assign]
        await cluster.kill("a", peers_know=True)
        assert forgotten == ["a"]
        await cluster.check()


# ---- messages lost and doubled

MESSAGES = [Offer, Refused, Pull, Stage, Final, KeepAlive, Withdraw, Query, Committed, Dropped]


@pytest.mark.parametrize("phase", [nothing, *PHASES])
@pytest.mark.parametrize("kind", MESSAGES)
@in_virtual_time
async def test_the_output_survives_one_lost_message(kind: type[MigrationMessage], phase: Scene) -> None:
    async with MigratingCluster("a", "b") as cluster:
        if phase is nothing:
            await enter(nothing, cluster, 60)
            cluster.faults.lose(kind, times=1)
            cluster.start_migration("a", "b")
        else:
            await enter(phase, cluster, 60)
            cluster.faults.lose(kind, times=1)
            cluster["a"].coordinator.cancel(RequestId("r"), "changed its mind")
        cluster.faults.release()
        await cluster.check()


@pytest.mark.parametrize("kind", MESSAGES)
@in_virtual_time
async def test_a_migration_ends_if_all_messages_of_one_type_are_lost(kind: type[MigrationMessage]) -> None:
    """For good: the request stays, or has moved, but it never waits for ever."""
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        cluster.faults.lose(kind)
        outcome = await cluster.migrate("a", "b")
        assert isinstance(outcome, MigrationRecord)
        assert outcome.committed == (kind not in (Offer, Pull, Stage, Final, Committed))
        await cluster.check()


@pytest.mark.parametrize("kind", MESSAGES)
@in_virtual_time
async def test_doubled_messages_move_a_request_once(kind: type[MigrationMessage]) -> None:
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        cluster.faults.double(kind)
        await moved(cluster)
        await cluster.check()
        assert cluster.routes["r"].ledger.num_moves == 1


@in_virtual_time
async def test_a_lost_commit_is_asked_for() -> None:
    """Never guessed: one question, one answer, and the blocks of the source come back."""
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        cluster.faults.lose(Committed, times=1)
        outcome = await moved(cluster)
        assert sum(isinstance(message, Query) for message in cluster.sent) == 1
        assert not any(isinstance(message, Withdraw) for message in cluster.sent)
        assert 1e3 * BOUNDS.acknowledge_s <= outcome.suspended_ms <= 1e3 * (BOUNDS.acknowledge_s + 0.1)
        await cluster.check()


@in_virtual_time
async def test_a_lost_final_state_is_sent_again() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        cluster.faults.lose(Final, times=1)
        await moved(cluster)
        assert sum(isinstance(message, Final) for message in cluster.sent) == 2
        await cluster.check()


@in_virtual_time
async def test_a_source_takes_the_request_back_after_the_last_question() -> None:
    """The destination has committed and decodes; all its answers are lost. The source outranks it."""
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 200)
        await cluster.tokens(3)
        cluster.faults.lose(Committed)
        outcome = await cluster.migrate("a", "b")
        assert isinstance(outcome, MigrationRecord)
        assert outcome.why == f"no commit after {BOUNDS.questions} questions about it"
        assert sum(isinstance(message, Query) for message in cluster.sent) == BOUNDS.questions
        await cluster.check()
        assert (cluster.routes["r"].ledger.owner, cluster.routes["r"].ledger.epoch) == ("a", 2)


@in_virtual_time
async def test_a_late_message_of_an_old_migration_ends_nothing() -> None:
    """More migrations have followed than a source remembers; the request lives at its destination."""
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        await moved(cluster)
        late = next(message for message in cluster.sent if isinstance(message, Committed))
        cluster["a"].coordinator._given_up.clear()
        for message in (late, Pull(late.migration_id, 0)):
            cluster["a"].coordinator.on_message(B, message)
        await cluster.check()
        assert not any(isinstance(message, Withdraw) for message in cluster.sent)
        assert cluster.routes["r"].ledger.owner == "b"


# ---- races of the drivers


@in_virtual_time
async def test_a_copy_that_is_withdrawn_before_its_first_step_ends() -> None:
    """The copy is stopped before its first step, and says so all the same."""
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        cluster.faults.hold(Stage)
        cluster.start_migration("a", "b")
        await cluster.until(SS.STAGING, DS.WAITING)
        cluster["a"].coordinator.cancel(RequestId("r"), "changed its mind")
        (stage, withdraw) = cluster.sent[-2:]
        assert isinstance(stage, Stage)
        cluster["b"].coordinator.on_message(A, stage)
        cluster["b"].coordinator.on_message(A, withdraw)  # type: ignore[arg-type]
        assert cluster.states("a", "b") == (None, DS.STOPPING)
        await cluster.check()


@pytest.mark.parametrize("states", [0, 1])
@in_virtual_time
async def test_blocks_of_other_cache_groups_are_not_copied(states: int) -> None:
    """A source whose engine has one group more, or a state."""
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        cluster.faults.hold(Stage)
        migration = cluster.start_migration("a", "b")
        await cluster.until(SS.STAGING, DS.WAITING)
        stage = cluster.sent[-1]
        assert isinstance(stage, Stage)
        runs = stage.part.runs * (1 if states else 2)
        other = Stage(stage.migration_id, KvPart(stage.part.end, runs, [5] * states))
        cluster["b"].coordinator.on_message(A, other)
        refusal = (await migration).refusal  # type: ignore[union-attr]
        assert refusal is not None
        assert "other cache groups" in refusal.text
        await cluster.check()


@in_virtual_time
async def test_a_copy_that_fails_in_an_unforeseen_way_gives_its_blocks_back() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)

        async def read(*args: object) -> int:
            raise ValueError("not foreseen")

        cluster["b"].coordinator._instance.transport.read = read  # type: ignore[method-assign]
        refusal = await not_moved(cluster)
        assert refusal.code is RefusalCode.COPY_FAILED
        assert "not foreseen" in refusal.text
        assert [type(error) for error in cluster["b"].failures] == [ValueError]
        cluster["b"].failures.clear()
        await cluster.check()


@in_virtual_time
async def test_questions_do_not_renew_the_bound_of_the_last_copy() -> None:
    """A stalled tail holds a suspended request up for `tail_s`, however often it is asked about."""
    async with MigratingCluster("a", "b", bounds=replace(BOUNDS, questions=1000)) as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        await tail(cluster)
        began = asyncio.get_running_loop().time()
        cluster.fabric.stall("a")
        while cluster.states("a", "b")[0] is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert asyncio.get_running_loop().time() - began < BOUNDS.tail_s + 0.1
        cluster.fabric.restore("a")
        await cluster.check()


@in_virtual_time
async def test_aborted_between_the_engines_answer_and_its_arrival() -> None:
    """Both wait on the loop: the end of the request is handled first, the final state after it."""
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        engine = cluster["a"].engine
        migrations = engine._migrations
        settle = migrations.settle_stages

        def settle_and_abort() -> None:
            settle()
            if migrations.suspended:
                migrations.settle_stages = settle  # type: ignore[method-assign]
                cluster.routes["r"].aborted = True
                cluster.routes["r"].ended.set()
                engine._end(migrations.suspended["r"])
                cluster["a"].coordinator.requests_ended([RequestId("r")])

        migrations.settle_stages = settle_and_abort  # type: ignore[method-assign]
        refusal = await not_moved(cluster)
        assert refusal == Refusal(RefusalCode.FINISHED, "the request ended at its source")
        assert not any(isinstance(message, Final) for message in cluster.sent)
        await cluster.check()


@in_virtual_time
async def test_a_migration_goes_on_if_its_caller_stops_waiting() -> None:
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        waiting = cluster.start_migration("a", "b")
        await cluster.until(SS.STAGING, DS.COPYING)
        waiting.cancel()
        await cluster.check()
        assert [outcome.committed for outcome in cluster["a"].records] == [True]


@pytest.mark.parametrize("phase", PHASES)
@in_virtual_time
async def test_closing_stops_all_timers_and_tasks(phase: Scene) -> None:
    async with MigratingCluster("a", "b") as cluster:
        await enter(phase, cluster, 60)
        for node in cluster.nodes.values():
            await node.coordinator.close()
        for message in cluster.sent:
            cluster["b"].coordinator.on_message(A, message)
        sent = len(cluster.sent)
        await asyncio.sleep(2 * BOUNDS.log_s)
        assert len(cluster.sent) == sent


@in_virtual_time
async def test_messages_that_are_not_allowed_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with MigratingCluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        await offered(cluster)
        (offer,) = cluster.sent[:1]
        assert isinstance(offer, Offer)
        cluster["b"].coordinator.on_message(A, offer)  # twice: ignored
        cluster["a"].coordinator.on_message(B, Committed(offer.migration_id))  # before any final state
        assert "acknowledged is not allowed in offered" in caplog.text
        assert cluster.states("a", "b") == (SS.OFFERED, DS.WAITING)
        cluster.faults.release()
        await cluster.check()
        assert cluster["a"].records[0].committed


@pytest.mark.parametrize("phase", [reserving, offered, staging, tail, committing, committed])
@in_virtual_time
async def test_a_request_is_recomputed_where_an_older_copy_is_or_arrives(phase: Scene) -> None:
    """The source dies and the very destination of the migration gets the request anew."""
    async with MigratingCluster("b", "a") as cluster:  # b is the first survivor
        await enter(phase, cluster, 60)
        await cluster.kill("a", peers_know=True)
        await cluster.check()
        assert cluster.routes["r"].ledger.epoch >= 1000


# ---- all of it at random


@pytest.mark.parametrize("seed", range(20))
@in_virtual_time
async def test_the_output_survives_random_migrations_under_random_faults(seed: int) -> None:
    """Three crowded instances, requests on the move, a lossy network, preemptions, aborts, a death."""
    rng = random.Random(seed)
    async with MigratingCluster("a", "b", "c", num_blocks=96, async_scheduling=seed % 2 == 1) as cluster:
        names = list(cluster.nodes)
        doomed = rng.choice([*names, ""])
        for number in range(8):
            prompt, tokens = rng.randrange(3, 40), rng.randrange(40, 160)
            await cluster.add(rng.choice(names), prompt, tokens, request_id=f"r{number}", seed=number)
        for turn in range(100):
            await asyncio.sleep(rng.random() * 0.03)
            alive = [name for name in names if cluster[name].alive]
            under_way = [rid for rid, route in cluster.routes.items() if not route.ended.is_set()]
            if not under_way:
                break
            request_id = rng.choice(under_way)
            owner = cluster.routes[request_id].ledger.owner
            match rng.randrange(16):
                case 0 if cluster[owner].alive:
                    cluster[owner].engine.preempt(RequestId(request_id))
                case 1 if rng.random() < 0.2:
                    cluster.abort(request_id)
                case 2:
                    cluster.fabric.stall(rng.choice(alive))
                case 3:
                    cluster.faults.isolate(*map(InstanceId, rng.sample(alive, 2)))
                case 4:
                    cluster.faults.double(rng.choice(MESSAGES))
                case 5:
                    cluster.faults.is_lost = lambda: rng.random() < 0.1
                case 6 | 7:
                    cluster.faults.heal()
                    for name in alive:
                        cluster.fabric.restore(name)
                case 8 if turn > 20 and doomed in alive:
                    await cluster.kill(doomed, peers_know=rng.random() < 0.5)
                case _ if cluster[owner].alive:
                    cluster.start_migration(owner, rng.choice(names), request_id)
        cluster.faults.heal()
        for name in names:
            if cluster[name].alive:
                cluster.fabric.restore(name)
        await cluster.check()
