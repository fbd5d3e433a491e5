"""Decisions between two reports."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from router.load import InstanceLoad
from router.policies import policy_set
from router.projected_loads import ProjectedLoads
from router.request import NewRequest
from tests.unit.router.made_loads import decode, neutral, prefill


def book_of(*loads: InstanceLoad) -> ProjectedLoads:
    book = ProjectedLoads()
    for load in loads:
        book.report(load)
    return book


# ---- dispatch


def test_a_burst_between_two_reports_does_not_herd() -> None:
    """All of it is decided on one report, in which both instances look idle."""
    book = book_of(prefill("p0"), prefill("p1"))

    assert Counter(book.dispatch(NewRequest(100)) for _ in range(10)) == {"p0": 5, "p1": 5}


def test_a_long_prompt_weighs_as_much_as_many_short_ones() -> None:
    book = book_of(prefill("p0"), prefill("p1"))

    assert [book.dispatch(NewRequest(1000))] + [book.dispatch(NewRequest(250)) for _ in range(4)] == [
        "p0",
        "p1",
        "p1",
        "p1",
        "p1",
    ]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40))
def test_a_burst_is_spread_to_within_its_longest_prompt(prompts: list[int]) -> None:
    book = book_of(prefill("p0"), prefill("p1"), prefill("p2"))
    backlog = Counter({"p0": 0, "p1": 0, "p2": 0})
    for tokens in prompts:
        backlog[book.dispatch(NewRequest(tokens))] += tokens

    assert max(backlog.values()) - min(backlog.values()) <= max(prompts)


def test_a_dispatch_that_a_report_has_seen_is_not_counted_twice() -> None:
    """p0 has got its request and still has all of it to compute: its report says so."""
    book = book_of(prefill("p0"), prefill("p1", waiting_tokens=150))
    assert book.dispatch(NewRequest(100)) == "p0"

    book.report(prefill("p0", waiting_tokens=100, requests_added=1))

    assert book.dispatch(NewRequest(100)) == "p0"


def test_a_dispatch_that_a_report_has_not_seen_still_counts() -> None:
    """The report was on its way when the request was sent."""
    book = book_of(prefill("p0"), prefill("p1", waiting_tokens=50))
    assert book.dispatch(NewRequest(100)) == "p0"

    book.report(prefill("p0", requests_added=0))

    assert book.dispatch(NewRequest(100)) == "p1"


def test_a_report_may_have_seen_a_part_of_the_dispatches() -> None:
    book = book_of(prefill("p0"), prefill("p1", waiting_tokens=1000))
    assert [book.dispatch(NewRequest(400)), book.dispatch(NewRequest(400))] == ["p0", "p0"]

    book.report(
        prefill("p0", waiting_tokens=0, requests_added=1)
    )  # the first is computed, the second not there yet
    assert book.dispatch(NewRequest(500)) == "p0"  # 400 are pending

    assert book.dispatch(NewRequest(1)) == "p0"  # 900
    assert book.dispatch(NewRequest(200)) == "p0"  # 901
    assert book.dispatch(NewRequest(1)) == "p1"  # 1101


def test_counting_starts_from_what_the_instance_has_had() -> None:
    """This API server is new, or not the only one."""
    book = book_of(prefill("p0", requests_added=7), prefill("p1", waiting_tokens=50))
    assert book.dispatch(NewRequest(100)) == "p0"
    assert book.dispatch(NewRequest(100)) == "p1"

    book.report(prefill("p0", requests_added=8))

    assert book.dispatch(NewRequest(10)) == "p0"


def test_nowhere_to_start_is_none() -> None:
    assert ProjectedLoads().dispatch(NewRequest(1)) is None
    assert book_of(decode("d0")).dispatch(NewRequest(1)) is None


# ---- hand-off


def test_expected_requests_count_until_they_are_settled() -> None:
    book = book_of(decode("d0"), decode("d1", 90))
    assert book.destinations(10) == ["d0", "d1"]

    book.expect("d0", "r", 30)
    assert book.destinations(10) == ["d1", "d0"]
    assert (book.free_blocks("d0"), book.free_blocks("d1")) == (70, 90)

    book.settled("d0", "r")
    assert book.destinations(10) == ["d0", "d1"]
    assert book.free_blocks("d0") == 100


def test_a_burst_of_hand_offs_is_spread() -> None:
    book = book_of(decode("d0"), decode("d1"))
    chosen = []
    for number in range(10):
        chosen.append(book.destinations(5)[0])
        book.expect(chosen[-1], f"r{number}", 5)

    assert Counter(chosen) == {"d0": 5, "d1": 5}


def test_a_request_is_expected_once_with_its_latest_size() -> None:
    book = book_of(decode("d0"))
    book.expect("d0", "r", 30)
    book.expect("d0", "r", 40)

    assert book.free_blocks("d0") == 60


def test_settling_what_is_not_expected_changes_nothing() -> None:
    book = book_of(decode("d0"))
    book.expect("d0", "r", 30)
    book.settled("d0", "another")
    book.settled("d9", "r")
    book.settled("", "r")

    assert book.free_blocks("d0") == 70


# ---- reports


def test_the_latest_report_counts() -> None:
    book = book_of(decode("d0", 10), decode("d0", 20))

    assert [load.free_blocks for load in book] == [20]
    assert "d0" in book
    assert book["d0"] is book.get("d0")


def test_an_instance_that_is_removed_leaves_nothing_behind() -> None:
    """One of the same name that joins later starts from its own report."""
    book = book_of(prefill("p0"), decode("d0"))
    book.dispatch(NewRequest(1000))
    book.expect("d0", "r", 50)

    book.remove("p0")
    book.remove("d0")

    assert list(book) == []
    assert (book.get("p0"), "d0" in book) == (None, False)
    assert (book.dispatch(NewRequest(1)), book.destinations(1)) == (None, [])
    for load in (prefill("p0"), prefill("p1", waiting_tokens=1), decode("d0")):
        book.report(load)
    assert book.dispatch(NewRequest(1)) == "p0"
    assert book.free_blocks("d0") == 100


def test_removing_an_unknown_instance_changes_nothing() -> None:
    book = book_of(decode("d0"))
    book.remove("d9")

    assert "d0" in book


# ---- policies


def test_a_burst_on_neutral_instances_spreads_by_freeness() -> None:
    book = book_of(neutral("i0"), neutral("i1"))

    assert Counter(book.dispatch(NewRequest(160)) for _ in range(10)) == {"i0": 5, "i1": 5}


def test_what_is_dispatched_counts_like_what_is_reported() -> None:
    book = book_of(neutral("i0", requests_added=4))
    book.dispatch(NewRequest(33))
    book.dispatch(NewRequest(16))
    load = book.corrected("i0")

    assert (load.waiting, load.waiting_tokens, load.waiting_blocks, load.requests_added) == (2, 49, 4, 6)
    book.report(load)
    assert book.corrected("i0") == load


def test_the_policy_set_decides() -> None:
    """Freest is i1; the shortest queue is i0's."""
    cluster = [neutral("i0", free=10), neutral("i1", waiting=1)]
    chosen = {}
    for name in ("queue", "infaas++"):
        book = ProjectedLoads(policy_set(name))
        for load in cluster:
            book.report(load)
        chosen[name] = book.dispatch(NewRequest(16))

    assert chosen == {"queue": "i0", "infaas++": "i1"}


def test_headroom_counts_where_the_policy_set_says_so() -> None:
    cluster = [neutral("i0", total=800, free=800, high_priority=1), neutral("i1", total=800, free=700)]
    chosen = {}
    for name in ("llumnix-paper", "infaas++"):
        book = ProjectedLoads(policy_set(name))
        for load in cluster:
            book.report(load)
        chosen[name] = book.dispatch(NewRequest(16))

    assert chosen == {"llumnix-paper": "i1", "infaas++": "i0"}


# ---- old reports


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_who_has_not_reported_for_long_is_not_chosen() -> None:
    clock = Clock()
    book = ProjectedLoads(clock=clock)
    for load in (prefill("p0"), prefill("p1", 900), decode("d0"), decode("d1", 1)):
        book.report(load)
    clock.now = 2.5
    book.report(prefill("p1", 900))
    book.report(decode("d1", 1))
    assert (book.dispatch(NewRequest(1)), book.destinations(1)[0]) == ("p0", "d0")

    clock.now = 3.5
    assert (book.dispatch(NewRequest(1)), book.destinations(1)) == ("p1", ["d1"])

    book.report(prefill("p0"))
    assert book.dispatch(NewRequest(1)) == "p0"


def test_where_all_reports_are_old_the_last_ones_count() -> None:
    """Refusing everything would make an outage of a stall."""
    clock = Clock()
    book = ProjectedLoads(clock=clock)
    for load in (prefill("p0"), prefill("p1", 900), decode("d0"), decode("d1", 1)):
        book.report(load)
    clock.now = 100.0

    assert (book.dispatch(NewRequest(1)), book.destinations(1)) == ("p0", ["d0", "d1"])
