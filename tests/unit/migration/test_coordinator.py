"""Coordinators, drivers and the local transport between engines whose output shows every wrong block.

Each test ends with `Cluster.check`: the output is that of an undisturbed run, each token once, and no
block, slot, table entry, timer or task is left.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from migration.destination_table import DestinationState as DS
from migration.messages import (
    Committed,
    Dropped,
    Final,
    InstanceId,
    KeepAlive,
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
from tests.unit.migration.fake_cluster import BOUNDS, Cluster
from tests.unit.migration.fake_engine import BLOCK_TOKENS, blocks_for
from tests.virtual_time import in_virtual_time

PROMPT = [7, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]
A, B = InstanceId("a"), InstanceId("b")


async def moved(cluster: Cluster, source: str = "a", destination: str = "b") -> MigrationRecord:
    outcome = await cluster.migrate(source, destination)
    assert isinstance(outcome, MigrationRecord)
    assert outcome.committed, outcome.why
    return outcome


async def not_moved(cluster: Cluster, source: str = "a", destination: str = "b") -> str:
    outcome = await cluster.migrate(source, destination)
    if isinstance(outcome, str):
        return outcome
    assert not outcome.committed
    return outcome.why


class TestUndisturbed:
    @pytest.mark.parametrize("steps_in_flight", [0, 1])
    @in_virtual_time
    async def test_moves_while_it_decodes(self, steps_in_flight: int) -> None:
        async with Cluster("a", "b", steps_in_flight=steps_in_flight) as cluster:
            await cluster.add("a", PROMPT, 40)
            await cluster.tokens(5)
            outcome = await moved(cluster)
            assert outcome.stages >= 2
            assert outcome.tokens == len(PROMPT) + len(cluster.routes["r"].ledger.token_ids) - 1
            assert outcome.blocks == blocks_for(outcome.tokens)
            assert cluster.routes["r"].ledger.owner == "a"
            await cluster.check()
            assert cluster.routes["r"].ledger.owner == "b"
            assert cluster.routes["r"].ledger.num_moves == 1
            assert cluster.routes["r"].recomputes == 0

    @in_virtual_time
    async def test_blocking_copies_all_at_once(self) -> None:
        async with Cluster("a", "b") as cluster:
            await cluster.add("a", PROMPT, 40)
            await cluster.tokens(5)
            outcome = await cluster["a"].coordinator.migrate(RequestId("r"), B, "test", blocking=True)
            assert outcome.committed
            assert outcome.stages == 1
            await cluster.check()

    @in_virtual_time
    async def test_blocks_that_a_prefix_cache_has_are_not_copied(self) -> None:
        async with Cluster("a", "b") as cluster:
            cluster["b"].engine.cached_blocks = 3
            await cluster.add("a", PROMPT, 40)
            await cluster.tokens(5)
            outcome = await moved(cluster)
            assert outcome.blocks == blocks_for(outcome.tokens) - 3
            await cluster.check()

    @in_virtual_time
    async def test_ping_pong(self) -> None:
        """A request comes back to the instance that it has just left, again and again."""
        async with Cluster("a", "b", steps_in_flight=1) as cluster:
            await cluster.add("a", PROMPT, 120)
            await cluster.tokens(1)
            for _ in range(5):
                await moved(cluster, "a", "b")
                await moved(cluster, "b", "a")
            assert len(cluster.routes["r"].ledger.token_ids) < 120
            await cluster.check()
            assert cluster.routes["r"].ledger.epoch == 10

    @in_virtual_time
    async def test_eight_at_once(self) -> None:
        async with Cluster("a", "b", num_blocks=256) as cluster:
            for number in range(8):
                await cluster.add("a", [number, *PROMPT], 30 + number, request_id=f"r{number}")
            await cluster.tokens(3, "r7")
            outcomes = await asyncio.gather(*(cluster.migrate("a", "b", f"r{i}") for i in range(8)))
            assert all(isinstance(o, MigrationRecord) and o.committed for o in outcomes)
            assert cluster["a"].coordinator.num_outgoing == cluster["b"].coordinator.num_incoming == 0
            await cluster.check()

    @in_virtual_time
    async def test_in_both_directions_at_once(self) -> None:
        async with Cluster("a", "b") as cluster:
            await cluster.add("a", PROMPT, 40, request_id="there")
            await cluster.add("b", PROMPT, 50, request_id="back")
            await cluster.tokens(3, "back")
            await cluster.tokens(3, "there")
            outcomes = await asyncio.gather(
                cluster.migrate("a", "b", "there"), cluster.migrate("b", "a", "back")
            )
            assert all(isinstance(o, MigrationRecord) and o.committed for o in outcomes)
            await cluster.check()

    @pytest.mark.parametrize("steps_in_flight", [0, 1])
    @in_virtual_time
    async def test_hand_off_during_a_chunked_prefill(self, steps_in_flight: int) -> None:
        """Stages move while the prompt is being computed; the first token comes from the source."""
        prompt = PROMPT * 8
        async with Cluster("a", "b", steps_in_flight=steps_in_flight) as cluster:
            await cluster.add("a", prompt, 20, handoff=True)
            await cluster.until(SS.STAGING, DS.COPYING)
            assert not cluster.routes["r"].ledger.token_ids
            await cluster.check()
            (outcome,) = cluster["a"].outcomes
            assert outcome.committed
            assert outcome.stages > 3
            assert outcome.tokens < len(prompt) + 6
            assert cluster.routes["r"].ledger.owner == "b"

    @in_virtual_time
    async def test_a_long_prefill_keeps_the_reservation(self) -> None:
        """The destination has all of the prompt in its prefix cache, so nothing can be staged for long."""
        prompt = PROMPT * 16
        async with Cluster("a", "b", num_blocks=128, bounds=replace(BOUNDS, lease_s=0.25)) as cluster:
            cluster["b"].engine.cached_blocks = 100
            cluster.network.double(Pull)
            await cluster.add("a", prompt, 20, handoff=True)
            await cluster.check()
            assert cluster["a"].outcomes[0].committed
            assert any(isinstance(message, KeepAlive) for message in cluster.network.sent)

    @in_virtual_time
    async def test_a_request_that_never_catches_up_is_suspended_all_the_same(self) -> None:
        """Copying takes as long as decoding: after so many stages the rest is copied at once."""
        async with Cluster("a", "b", bounds=replace(BOUNDS, max_stages=3)) as cluster:
            cluster.fabric.latency_s = 0.15
            await cluster.add("a", PROMPT, 150)
            await cluster.tokens(5)
            outcome = await moved(cluster)
            assert outcome.stages == 4
            await cluster.check()


class TestRefused:
    @in_virtual_time
    async def test_with_the_reason(self) -> None:
        async with Cluster("a", "b") as cluster:
            cluster["b"].engine.refusal = "the model differs"
            await cluster.add("a", PROMPT, 20)
            await cluster.tokens(2)
            assert await not_moved(cluster) == "refused: the model differs"
            assert cluster.states("a", "b") == (None, None)
            await cluster.check()

    @in_virtual_time
    async def test_by_who_has_no_blocks(self) -> None:
        async with Cluster("a", "b", num_blocks=12) as cluster:
            await cluster.add("b", PROMPT * 2, 20, request_id="large")
            await cluster.add("a", PROMPT, 30)
            await cluster.tokens(2)
            await cluster.tokens(2, "large")
            assert "free blocks" in await not_moved(cluster)
            await cluster.check()

    @in_virtual_time
    async def test_beyond_the_limit_of_arrivals(self) -> None:
        bounds = replace(BOUNDS, max_incoming=2)
        async with Cluster("a", "b", num_blocks=128, bounds=bounds) as cluster:
            for number in range(4):
                await cluster.add("a", [number, *PROMPT], 40, request_id=f"r{number}")
            await cluster.tokens(2, "r3")
            outcomes = await asyncio.gather(*(cluster.migrate("a", "b", f"r{i}") for i in range(4)))
            why = sorted(o.why for o in outcomes if isinstance(o, MigrationRecord))
            assert why == ["", "", *["refused: 2 migrations are arriving already"] * 2]
            await cluster.check()

    @in_virtual_time
    async def test_beyond_the_limit_of_departures(self) -> None:
        bounds = replace(BOUNDS, max_outgoing=2)
        async with Cluster("a", "b", num_blocks=128, bounds=bounds) as cluster:
            for number in range(4):
                await cluster.add("a", [number, *PROMPT], 40, request_id=f"r{number}")
            await cluster.tokens(2, "r3")
            outcomes = await asyncio.gather(*(cluster.migrate("a", "b", f"r{i}") for i in range(4)))
            assert [o for o in outcomes if isinstance(o, str)] == ["2 migrations are leaving already"] * 2
            await cluster.check()

    @in_virtual_time
    async def test_what_cannot_begin(self) -> None:
        async with Cluster("a", "b", "c") as cluster:
            await cluster.add("a", PROMPT, 40)
            await cluster.tokens(2)
            assert await not_moved(cluster, "a", "a") == "the request is on a already"
            assert await not_moved(cluster, "b", "a") == "not running here"
            under_way = cluster.start_migration("a", "b")
            await cluster.until(SS.STAGING, DS.COPYING)
            assert await not_moved(cluster, "a", "c") == "the request is being migrated already"
            assert isinstance(outcome := await under_way, MigrationRecord)
            assert outcome.committed
            await cluster.check()


# ---- every phase against every disaster


async def offered(cluster: Cluster) -> None:
    cluster.network.hold_at(Pull)
    cluster.start_migration("a", "b")
    await cluster.until(SS.OFFERED, DS.WAITING)


async def reserving(cluster: Cluster) -> None:
    cluster["b"].engine.reserve_s = 0.5
    cluster.start_migration("a", "b")
    await cluster.until(SS.OFFERED, DS.RESERVING)


async def advancing(cluster: Cluster) -> None:
    cluster["b"].engine.cached_blocks = 100
    await cluster.tokens(BLOCK_TOKENS)
    cluster.start_migration("a", "b")
    await cluster.until(SS.ADVANCING, DS.WAITING)


async def staging(cluster: Cluster) -> None:
    cluster.fabric.latency_s = 0.1
    cluster.start_migration("a", "b")
    await cluster.until(SS.STAGING, DS.COPYING)


async def suspended(cluster: Cluster) -> None:
    cluster.network.hold_at(Final)
    cluster.start_migration("a", "b")
    await cluster.until(SS.SUSPENDED, DS.WAITING)


async def tail(cluster: Cluster) -> None:
    cluster.start_migration("a", "b")
    await cluster.until(SS.SUSPENDED, DS.TAIL)


async def committing(cluster: Cluster) -> None:
    cluster["b"].engine.commit_s = 0.1
    cluster.start_migration("a", "b")
    await cluster.until(SS.SUSPENDED, DS.COMMITTING)


async def committed(cluster: Cluster) -> None:
    cluster.network.hold_at(Committed)
    cluster.start_migration("a", "b")
    await cluster.until(SS.SUSPENDED, DS.COMMITTED)


async def releasing(cluster: Cluster) -> None:
    cluster["a"].engine.release_s = 0.1
    cluster.start_migration("a", "b")
    await cluster.until(SS.RELEASING, DS.COMMITTED)


PHASES = [offered, reserving, advancing, staging, suspended, tail, committing, committed, releasing]
RUNNING_PHASES = [offered, reserving, advancing, staging]


async def nothing(cluster: Cluster) -> None:
    """The phases themselves hold messages back and slow things down."""


async def client_leaves(cluster: Cluster) -> None:
    cluster.abort()


async def preempted(cluster: Cluster) -> None:
    cluster["a"].engine.preempt(RequestId("r"))


async def cancelled(cluster: Cluster) -> None:
    cluster["a"].coordinator.cancel(RequestId("r"), "changed its mind")


async def destination_dies(cluster: Cluster) -> None:
    await cluster.kill("b", peers_know=True)


async def destination_dies_in_silence(cluster: Cluster) -> None:
    await cluster.kill("b", peers_know=False)


async def source_dies(cluster: Cluster) -> None:
    await cluster.kill("a", peers_know=True)


async def source_dies_in_silence(cluster: Cluster) -> None:
    await cluster.kill("a", peers_know=False)


async def peers_part(cluster: Cluster) -> None:
    """Scenario: neither hears the other for longer than all bounds; the front end hears both."""
    cluster.network.cut(A, B)
    await asyncio.sleep(10)
    cluster.network.heal()


async def peer_is_thought_dead(cluster: Cluster) -> None:
    """Scenario: a wrong membership list; both live on."""
    cluster["a"].coordinator.peer_lost(B)
    cluster["b"].coordinator.peer_lost(A)


async def copies_fail(cluster: Cluster) -> None:
    cluster.fabric.fail("a")
    await asyncio.sleep(1)
    cluster.fabric.restore("a")


async def copies_stall(cluster: Cluster) -> None:
    """Longer than every bound of a copy, and of the questions about it."""
    cluster.fabric.stall("a")
    await asyncio.sleep(5)
    cluster.fabric.restore("a")


async def destination_is_full(cluster: Cluster) -> None:
    with cluster["b"].engine.without_free_blocks():
        await asyncio.sleep(1)


async def commit_fails(cluster: Cluster) -> None:
    cluster["b"].engine.fail_commits = 1


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

Scene = Callable[[Cluster], Awaitable[None]]


@pytest.mark.parametrize("disaster", DISASTERS)
@pytest.mark.parametrize("phase", PHASES)
@in_virtual_time
async def test_every_disaster_in_every_phase(phase: Scene, disaster: Scene) -> None:
    async with Cluster("a", "b", "c") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        await phase(cluster)
        await disaster(cluster)
        cluster.network.let_go()
        await cluster.check()


@pytest.mark.parametrize("phase", RUNNING_PHASES)
@pytest.mark.parametrize("steps_in_flight", [0, 1])
@in_virtual_time
async def test_source_finishes_in_every_phase(phase: Scene, steps_in_flight: int) -> None:
    async with Cluster("a", "b", steps_in_flight=steps_in_flight) as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        await phase(cluster)
        cluster["a"].engine.stop_after_next_token(RequestId("r"))
        await cluster.end()
        cluster.network.let_go()
        route = cluster.routes["r"]
        assert len(route.ledger.token_ids) < 40
        route.aborted = True  # a prefix of the whole output is right
        await cluster.check()


@in_virtual_time
async def test_source_finishes_with_its_last_step_in_flight() -> None:
    """Suspended at a step boundary, and the step in flight brings the last token."""
    for tokens in range(8, 20):
        async with Cluster("a", "b", steps_in_flight=1) as cluster:
            await cluster.add("a", PROMPT, tokens)
            await cluster.tokens(3)
            await cluster.migrate("a", "b")
            await cluster.check()


@pytest.mark.parametrize("phase", PHASES)
@in_virtual_time
async def test_every_wait_has_a_bound(phase: Scene) -> None:
    """Neither ever hears the other again: both sides end by themselves, long before the request does."""
    async with Cluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 100)
        await cluster.tokens(3)
        await phase(cluster)
        cluster["a"].engine.step_s = cluster["b"].engine.step_s = 1.0
        cluster.network.cut(A, B)
        await asyncio.sleep(
            BOUNDS.copy_s + 2 * BOUNDS.lease_s + 2 * (BOUNDS.questions + 1) * BOUNDS.acknowledge_s + 4.0
        )
        assert cluster.states("a", "b") in ((None, None), (None, DS.COMMITTED))
        assert not cluster.routes["r"].ended.is_set()
        cluster["a"].engine.step_s = cluster["b"].engine.step_s = 0.01
        await cluster.check()


@in_virtual_time
async def test_a_destination_that_knows_nothing_of_it_says_so() -> None:
    """It has dropped the reservation and this word was lost: the final state is answered all the same."""
    async with Cluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        await suspended(cluster)
        cluster.network.lose(Dropped, times=1)
        cluster["b"].coordinator.peer_lost(A)
        await cluster.until(SS.SUSPENDED, None)
        cluster.network.let_go()
        await asyncio.sleep(2 * BOUNDS.acknowledge_s)
        (outcome,) = cluster["a"].outcomes
        assert outcome.why == "dropped by the destination: unknown here"
        await cluster.check()


@in_virtual_time
async def test_the_connection_to_a_dead_peer_is_dropped() -> None:
    async with Cluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        await moved(cluster)
        forgotten: list[str] = []
        cluster["b"].coordinator._transport.forget = forgotten.append  # type: ignore[method-assign]
        await cluster.kill("a", peers_know=True)
        assert forgotten == ["a"]
        await cluster.check()


# ---- messages lost and doubled

MESSAGES = [Offer, Refused, Pull, Stage, Final, KeepAlive, Withdraw, Query, Committed, Dropped]


@pytest.mark.parametrize("phase", [nothing, *PHASES])
@pytest.mark.parametrize("kind", MESSAGES)
@in_virtual_time
async def test_one_message_is_lost(kind: type[MigrationMessage], phase: Scene) -> None:
    async with Cluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        if phase is nothing:
            cluster.network.lose(kind, times=1)
            cluster.start_migration("a", "b")
        else:
            await phase(cluster)
            cluster.network.lose(kind, times=1)
            cluster["a"].coordinator.cancel(RequestId("r"), "changed its mind")
        cluster.network.let_go()
        await cluster.check()


@pytest.mark.parametrize("kind", MESSAGES)
@in_virtual_time
async def test_all_messages_of_a_kind_are_lost(kind: type[MigrationMessage]) -> None:
    """For good: the request stays, or has moved, but it never waits for ever."""
    async with Cluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        cluster.network.lose(kind)
        outcome = await cluster.migrate("a", "b")
        assert isinstance(outcome, MigrationRecord)
        assert outcome.committed == (kind not in (Offer, Pull, Stage, Final, Committed))
        await cluster.check()


@pytest.mark.parametrize("kind", MESSAGES)
@in_virtual_time
async def test_messages_come_twice(kind: type[MigrationMessage]) -> None:
    async with Cluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        cluster.network.double(kind)
        await moved(cluster)
        await cluster.check()
        assert cluster.routes["r"].ledger.num_moves == 1


@in_virtual_time
async def test_a_lost_commit_is_asked_for() -> None:
    """Never guessed: one question, one answer, and the blocks of the source come back."""
    async with Cluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        cluster.network.lose(Committed, times=1)
        outcome = await moved(cluster)
        assert sum(isinstance(message, Query) for message in cluster.network.sent) == 1
        assert not any(isinstance(message, Withdraw) for message in cluster.network.sent)
        assert 1e3 * BOUNDS.acknowledge_s <= outcome.suspended_ms <= 1e3 * (BOUNDS.acknowledge_s + 0.1)
        await cluster.check()


@in_virtual_time
async def test_a_lost_final_state_is_sent_again() -> None:
    async with Cluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        cluster.network.lose(Final, times=1)
        await moved(cluster)
        assert sum(isinstance(message, Final) for message in cluster.network.sent) == 2
        await cluster.check()


@in_virtual_time
async def test_gives_up_after_so_many_questions() -> None:
    """The destination has committed and decodes; all its answers are lost. The source outranks it."""
    async with Cluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 200)
        await cluster.tokens(3)
        cluster.network.lose(Committed)
        outcome = await cluster.migrate("a", "b")
        assert isinstance(outcome, MigrationRecord)
        assert outcome.why == f"no commit after {BOUNDS.questions} questions about it"
        assert sum(isinstance(message, Query) for message in cluster.network.sent) == BOUNDS.questions
        await cluster.check()
        assert (cluster.routes["r"].ledger.owner, cluster.routes["r"].ledger.epoch) == ("a", 2)


@in_virtual_time
async def test_a_late_word_about_an_old_migration_ends_nothing() -> None:
    """More migrations have followed than a source remembers; the request lives at its destination."""
    async with Cluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        await moved(cluster)
        late = next(message for message in cluster.network.sent if isinstance(message, Committed))
        cluster["a"].coordinator._given_up.clear()
        for message in (late, Pull(late.migration_id, 0)):
            cluster["a"].coordinator.on_message(B, message)
        await cluster.check()
        assert not any(isinstance(message, Withdraw) for message in cluster.network.sent)
        assert cluster.routes["r"].ledger.owner == "b"


# ---- races of the drivers


@in_virtual_time
async def test_stage_and_withdrawal_in_one_breath() -> None:
    """The copy is stopped before its first step, and says so all the same."""
    async with Cluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        cluster.network.hold_at(Stage)
        cluster.start_migration("a", "b")
        await cluster.until(SS.STAGING, DS.WAITING)
        cluster["a"].coordinator.cancel(RequestId("r"), "changed its mind")
        (stage, withdraw) = cluster.network.sent[-2:]
        assert isinstance(stage, Stage)
        cluster["b"].coordinator.on_message(A, stage)
        cluster["b"].coordinator.on_message(A, withdraw)  # type: ignore[arg-type]
        assert cluster.states("a", "b") == (None, DS.STOPPING)
        await cluster.check()


@in_virtual_time
async def test_a_copy_that_fails_in_an_unforeseen_way_gives_its_blocks_back() -> None:
    async with Cluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)

        async def read(*args: object) -> int:
            raise ValueError("not foreseen")

        cluster["b"].coordinator._transport.read = read  # type: ignore[method-assign]
        assert "not foreseen" in await not_moved(cluster)
        assert [type(error) for error in cluster["b"].failures] == [ValueError]
        cluster["b"].failures.clear()
        await cluster.check()


@in_virtual_time
async def test_questions_do_not_renew_the_bound_of_the_last_copy() -> None:
    """A stalled tail holds a suspended request up for `tail_s`, however often it is asked about."""
    async with Cluster("a", "b", bounds=replace(BOUNDS, questions=1000)) as cluster:
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
    async with Cluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        settle = cluster["a"].engine._settle_stages

        def settle_and_abort() -> None:
            settle()
            if cluster["a"].engine.suspended:
                cluster["a"].engine._settle_stages = settle  # type: ignore[method-assign]
                cluster.routes["r"].aborted = True
                cluster.routes["r"].ended.set()
                cluster["a"].engine._end(cluster["a"].engine.suspended[RequestId("r")])
                cluster["a"].coordinator.requests_ended([RequestId("r")])

        cluster["a"].engine._settle_stages = settle_and_abort  # type: ignore[method-assign]
        assert await not_moved(cluster) == "the request ended at its source"
        assert not any(isinstance(message, Final) for message in cluster.network.sent)
        await cluster.check()


@in_virtual_time
async def test_who_waits_for_an_outcome_may_leave() -> None:
    async with Cluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        waiting = cluster.start_migration("a", "b")
        await cluster.until(SS.STAGING, DS.COPYING)
        waiting.cancel()
        await cluster.check()
        assert [outcome.committed for outcome in cluster["a"].outcomes] == [True]


@pytest.mark.parametrize("phase", PHASES)
@in_virtual_time
async def test_closing_stops_all_timers_and_tasks(phase: Scene) -> None:
    async with Cluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        await phase(cluster)
        for node in cluster.nodes.values():
            await node.coordinator.close()
        for message in cluster.network.sent:
            cluster["b"].coordinator.on_message(A, message)
        sent = len(cluster.network.sent)
        await asyncio.sleep(2 * BOUNDS.log_s)
        assert len(cluster.network.sent) == sent


@in_virtual_time
async def test_messages_without_sense_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with Cluster("a", "b") as cluster:
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        await offered(cluster)
        (offer,) = cluster.network.sent[:1]
        assert isinstance(offer, Offer)
        cluster["b"].coordinator.on_message(A, offer)  # twice: ignored
        cluster["a"].coordinator.on_message(B, Committed(offer.migration_id))  # before any final state
        assert "acknowledged is not allowed in offered" in caplog.text
        assert cluster.states("a", "b") == (SS.OFFERED, DS.WAITING)
        cluster.network.let_go()
        await cluster.check()
        assert cluster["a"].outcomes[0].committed


@pytest.mark.parametrize("phase", [reserving, offered, staging, tail, committing, committed])
@in_virtual_time
async def test_recomputed_where_an_older_copy_is_or_arrives(phase: Scene) -> None:
    """The source dies and the very destination of the migration gets the request anew."""
    async with Cluster("b", "a") as cluster:  # b is the first survivor
        await cluster.add("a", PROMPT, 60)
        await cluster.tokens(3)
        await phase(cluster)
        await cluster.kill("a", peers_know=True)
        await cluster.check()
        assert cluster.routes["r"].ledger.epoch >= 1000


# ---- all of it at random


@pytest.mark.parametrize("seed", range(20))
@in_virtual_time
async def test_random_migrations_under_random_faults(seed: int) -> None:
    """Three crowded instances, requests on the move, a lossy network, preemptions, aborts, a death."""
    rng = random.Random(seed)
    async with Cluster("a", "b", "c", num_blocks=96, steps_in_flight=seed % 2) as cluster:
        names = list(cluster.nodes)
        doomed = rng.choice([*names, ""])
        for number in range(8):
            prompt = [rng.randrange(100) for _ in range(rng.randrange(3, 40))]
            await cluster.add(rng.choice(names), prompt, rng.randrange(40, 160), request_id=f"r{number}")
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
                    cluster.network.cut(*map(InstanceId, rng.sample(alive, 2)))
                case 4:
                    cluster.network.double(rng.choice(MESSAGES))
                case 5:
                    cluster.network.chance = lambda: rng.random() < 0.1
                case 6 | 7:
                    cluster.network.heal()
                    for name in alive:
                        cluster.fabric.restore(name)
                        cluster.network.cut(*(InstanceId(n) for n in names if not cluster[n].alive))
                case 8 if turn > 20 and doomed in alive:
                    await cluster.kill(doomed, peers_know=rng.random() < 0.5)
                case _ if cluster[owner].alive:
                    cluster.start_migration(owner, rng.choice(names), request_id)
        cluster.network.heal()
        for name in names:
            if cluster[name].alive:
                cluster.fabric.restore(name)
        await cluster.check()
