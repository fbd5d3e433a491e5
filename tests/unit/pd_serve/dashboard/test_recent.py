"""Latencies of the last minutes in slots, and the last moves."""

import random

import pytest

from migration.record import MigrationRecord
from pd_serve.dashboard.recent import (
    GROWTH,
    NUM_MOVES,
    NUM_SLOTS,
    SLOT_S,
    RecentEvents,
    Slot,
    bucket_of,
    quantile,
)
from pd_serve.observe.timeline import Timeline
from tests.manual_clock import ManualClock
from tests.unit.pd_serve.made_migrations import FULL, migrated


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def recent(clock: ManualClock) -> RecentEvents:
    return RecentEvents(clock)


def ended(number: int, *, committed: bool = True) -> MigrationRecord:
    refusal = None if committed else FULL
    return migrated(f"r{number}", "decode-0", "decode-1", "balance", refusal, blocks=number)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_a_quantile_is_right_to_within_a_bucket(share: float) -> None:
    values = sorted(random.Random(7).lognormvariate(-3, 1.5) for _ in range(999))
    counts: dict[int, int] = {}
    for value in values:
        counts[bucket_of(value)] = counts.get(bucket_of(value), 0) + 1

    found = quantile(counts, share)

    exact = values[max(0, -(-int(share * 100) * 999 // 100) - 1)]
    assert found == pytest.approx(exact, rel=GROWTH - 1)


def test_of_nothing_there_is_no_quantile() -> None:
    assert quantile({}, 0.5) is None


def test_a_gap_of_nothing_counts_too(recent: RecentEvents) -> None:
    recent.token_gaps({0.0: 3})

    assert recent.slots()[0].tokens == 3


def test_slots_have_tokens_and_latencies(recent: RecentEvents, clock: ManualClock) -> None:
    request = Timeline("r", "r", clock.now - 0.2, 10, 0, first_token_at=clock.now)
    recent.first_token(request)
    recent.token_gaps({0.02: 98, 0.5: 2})
    clock.now += SLOT_S
    recent.token_gaps({0.03: 1})

    first, second = (slot.row() for slot in recent.slots())

    assert (first[0] + 1, first[1], second[1]) == (second[0], 101, 1)
    assert first[2:] == pytest.approx((0.2, 0.2, 0.02, 0.5), rel=GROWTH - 1)
    assert second[2:4] == (None, None)


def test_the_summary_is_of_the_last_minute(recent: RecentEvents, clock: ManualClock) -> None:
    recent.token_gaps({5.0: 1000})
    clock.now += 60.0
    recent.token_gaps({0.02: 600})

    summary = recent.summary()

    assert summary["itl_p99"] == pytest.approx(0.02, rel=GROWTH - 1)
    assert summary["ttft_p50"] is None
    assert summary["tokens_per_s"] == pytest.approx(600 / 55, abs=0.1)


def test_what_is_long_ago_is_forgotten(recent: RecentEvents, clock: ManualClock) -> None:
    for number in range(3 * NUM_MOVES):
        clock.now += SLOT_S
        recent.token_gaps({0.02: 1})
        recent.migration_ended(ended(number))

    assert len(recent.slots()) == NUM_SLOTS
    assert [move.record.blocks for move in recent.moves] == list(range(2 * NUM_MOVES, 3 * NUM_MOVES))
    clock.now += NUM_SLOTS * SLOT_S
    assert recent.slots() == []


def test_hand_offs_do_not_drive_out_other_migrations(recent: RecentEvents) -> None:
    recent.migration_ended(ended(1))
    for number in range(2 * NUM_MOVES):
        recent.migration_ended(migrated(f"h{number}", "prefill-0", "decode-1", "handoff"))

    moves = recent.moves
    assert (moves[0].record.reason, len(moves)) == ("balance", NUM_MOVES + 1)
    assert [move.number for move in moves] == sorted(move.number for move in moves)
    assert recent.last_move == 2 * NUM_MOVES + 1


def test_requests_that_have_ended_and_errors_are_counted_for_a_minute(
    recent: RecentEvents, clock: ManualClock
) -> None:
    for outcome in ("stop", "error", "length"):
        recent.ended(Timeline("r", "r", clock.now, 10, 0, outcome=outcome))

    assert recent.outcomes() == {"ended": 3, "errors": 1}
    clock.now += 61.0
    assert recent.outcomes() == {"ended": 0, "errors": 0}


def test_a_slot_has_the_last_load_that_was_seen(recent: RecentEvents, clock: ManualClock) -> None:
    recent.load(3, 1)
    recent.load(4, 0)
    clock.now += SLOT_S
    recent.token_gaps({0.02: 1})

    assert [(slot.running, slot.waiting) for slot in recent.slots()] == [(4, 0), (None, None)]


def test_what_other_api_servers_have_counted_is_added(recent: RecentEvents, clock: ManualClock) -> None:
    other = RecentEvents(clock)
    recent.token_gaps({0.05: 10})
    other.token_gaps({0.05: 30, 0.2: 1})
    other.ended(Timeline("r", "r", clock.now, 10, 0, outcome="error"))
    recent.load(3, 4)

    recent.note_elsewhere("b", other.counted(recent.next_of("b")))

    (slot,) = recent.slots()
    assert (slot.tokens, slot.ended, slot.errors) == (41, 1, 1)
    assert (slot.running, slot.waiting) == (3, 4), "those of the whole cluster are known here"
    assert sum(slot.gaps.values()) == 41
    assert recent.outcomes() == {"ended": 1, "errors": 1}
    assert [slot.tokens for slot in map(Slot.of, recent.counted(0))] == [10], "its own only"


def test_the_last_slot_of_another_api_server_is_read_again(recent: RecentEvents, clock: ManualClock) -> None:
    other = RecentEvents(clock)
    for _ in range(3):
        other.token_gaps({0.05: 1})
        recent.note_elsewhere("b", other.counted(recent.next_of("b")))
        other.token_gaps({0.05: 1})
        recent.note_elsewhere("b", other.counted(recent.next_of("b")))
        clock.now += SLOT_S

    assert [slot.tokens for slot in recent.slots()] == [2, 2, 2]
    assert len(other.counted(recent.next_of("b"))) == 1, "not what is known"


def test_what_another_api_server_has_counted_outlives_it_until_it_is_long_ago(
    recent: RecentEvents, clock: ManualClock
) -> None:
    other = RecentEvents(clock)
    other.token_gaps({0.05: 1})
    recent.note_elsewhere("b", other.counted(0))
    clock.now += SLOT_S

    assert [slot.tokens for slot in recent.slots()] == [1]
    clock.now += NUM_SLOTS * SLOT_S
    assert recent.slots() == []
    recent.note_elsewhere("c", [])
    assert recent._elsewhere == {}, "nothing is kept of those that are gone"
