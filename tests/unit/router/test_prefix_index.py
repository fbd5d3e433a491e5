"""Which instance has the blocks of which prompts."""

import pytest

from router.prefix_index import EXPECTED_S, MAX_EXPECTED, PrefixIndex
from tests.manual_clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(0.0)


@pytest.fixture
def index(clock: ManualClock) -> PrefixIndex:
    index = PrefixIndex(clock)
    index.key_tokens = 16
    return index


def test_the_run_from_the_first_key_counts(index: PrefixIndex) -> None:
    index.add("d0", [1, 2, 4, 5], 100)

    assert index.held_tokens("d0", [1, 2, 3, 4, 5]) == 32
    assert index.held_tokens("d0", [3, 4, 5]) == 0
    assert index.held_tokens("d0", []) == 0
    assert index.held_tokens("d1", [1, 2]) == 0


def test_what_an_instance_has_lost_does_not_count(index: PrefixIndex) -> None:
    index.add("d0", [1, 2, 3], 100)
    index.discard("d0", [2, 7])
    index.discard("d9", [2])

    assert index.held_tokens("d0", [1, 2, 3]) == 16


def test_what_is_cleared_or_removed_is_forgotten(index: PrefixIndex) -> None:
    index.add("d0", [1, 3], 100)
    index.add("d1", [1, 2], 100)

    index.clear("d1")
    assert (index.held_tokens("d0", [1, 2]), index.held_tokens("d1", [1, 2])) == (16, 0)
    index.remove("d0")
    assert index.held_tokens("d0", [1, 2]) == 0


def test_an_instance_cannot_have_more_keys_than_blocks(index: PrefixIndex) -> None:
    index.add("d0", range(1000), 100)
    index.add("d0", range(1000, 2000), 100)

    assert len(index.keys("d0")) == 100


def test_keys_are_expected_where_a_request_was_sent(index: PrefixIndex, clock: ManualClock) -> None:
    index.add("p0", [1], 100)
    index.expect("p0", [1, 2, 3])

    assert index.held_tokens("p0", [1, 2, 3, 4], soon=True) == 48
    assert index.held_tokens("p0", [1, 2, 3, 4]) == 16
    index.discard("p0", [3])  # computed, and evicted since
    assert index.held_tokens("p0", [1, 2, 3], soon=True) == 32
    clock.now += EXPECTED_S
    assert index.held_tokens("p0", [1, 2, 3], soon=True) == 16


def test_expected_keys_are_bounded(index: PrefixIndex, clock: ManualClock) -> None:
    for first in range(0, 3 * MAX_EXPECTED, 1000):
        index.expect("p0", range(first, first + 1000))
    assert len(index._expected["p0"]) == MAX_EXPECTED

    clock.now += EXPECTED_S
    index.expect("p0", [1])
    assert len(index._expected["p0"]) == 1
    index.remove("p0")
    assert not index._expected
