"""Where a request starts, and where it is handed off to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from router.dispatch import can_start, choose_prefill, rank_destinations
from router.load import InstanceLoad


def prefill(name: str, waiting_tokens: int = 0, **other: int | bool) -> InstanceLoad:
    return InstanceLoad(name, "prefill", 100, 100, waiting_tokens=waiting_tokens, **other)


def decode(name: str, free_blocks: int = 100, running: int = 1, **other: int | bool) -> InstanceLoad:
    return InstanceLoad(name, "decode", 100, free_blocks, running=running, **other)


@st.composite
def clusters(draw: st.DrawFn) -> list[InstanceLoad]:
    return [
        InstanceLoad(
            f"i{number}",
            draw(st.sampled_from(["prefill", "decode", "neutral"])),
            total_blocks=100,
            free_blocks=draw(st.integers(0, 100)),
            running=draw(st.integers(0, 8)),
            waiting_tokens=draw(st.integers(0, 1000)),
            draining=draw(st.booleans()),
        )
        for number in range(draw(st.integers(0, 6)))
    ]


# ---- dispatch


@pytest.mark.parametrize(("role", "starts"), [("prefill", True), ("neutral", True), ("decode", False)])
def test_new_requests_go_to_prefill_and_neutral_instances(role: str, starts: bool) -> None:
    load = InstanceLoad("i0", role, 100, 100)

    assert can_start(load) is starts
    assert choose_prefill([load], {}) == ("i0" if starts else None)


def test_a_decode_instance_takes_none_however_idle_it_is() -> None:
    assert choose_prefill([decode("d0", running=0), prefill("p0", 100_000)], {}) == "p0"


def test_the_smallest_backlog_is_chosen() -> None:
    assert choose_prefill([prefill("p0", 300), prefill("p1", 100), prefill("p2", 200)], {}) == "p1"


def test_what_was_dispatched_since_the_report_is_part_of_the_backlog() -> None:
    assert choose_prefill([prefill("p0", 100), prefill("p1", 200)], {"p0": 150}) == "p1"


def test_ties_go_to_the_smaller_batch_then_by_name() -> None:
    assert choose_prefill([prefill("p0", running=2), prefill("p1", running=1, waiting=0)], {}) == "p1"
    assert choose_prefill([prefill("p0", running=1), prefill("p1", waiting=2)], {}) == "p0"
    assert choose_prefill([prefill("p1"), prefill("p0")], {}) == "p0"


def test_a_draining_instance_takes_nothing_new() -> None:
    assert choose_prefill([prefill("p0", draining=True), prefill("p1", 500)], {}) == "p1"
    assert choose_prefill([prefill("p0", draining=True)], {}) is None


def test_nobody_is_none() -> None:
    assert choose_prefill([], {}) is None


@given(clusters(), st.dictionaries(st.sampled_from(["i0", "i1", "i2"]), st.integers(0, 1000)))
def test_no_other_candidate_has_less_to_do(cluster: list[InstanceLoad], pending: dict[str, int]) -> None:
    chosen = choose_prefill(cluster, pending)

    backlogs = {
        load.instance_id: load.waiting_tokens + pending.get(load.instance_id, 0)
        for load in cluster
        if can_start(load)
    }
    assert (chosen is None) == (not backlogs)
    assert chosen is None or backlogs[chosen] == min(backlogs.values())


# ---- hand-off


def test_only_decode_instances_that_do_not_drain_are_destinations() -> None:
    cluster = [prefill("p0"), InstanceLoad("n0", "neutral", 100, 100), decode("d0", draining=True)]

    assert rank_destinations(cluster, {}, 1) == []
    assert rank_destinations([*cluster, decode("d1")], {}, 1) == ["d1"]


def test_the_freest_comes_first() -> None:
    cluster = [decode("d0", 50, running=5), decode("d1", 50, running=2), decode("d2", 100, running=0)]

    assert rank_destinations(cluster, {}, 10) == ["d2", "d1", "d0"]


def test_what_is_on_its_way_counts() -> None:
    cluster = [decode("d0", 80), decode("d1", 60)]

    assert rank_destinations(cluster, {}, 10) == ["d0", "d1"]
    assert rank_destinations(cluster, {"d0": 30}, 10) == ["d1", "d0"]


def test_full_instances_come_last_but_are_not_left_out() -> None:
    """The batch of the one with room is so large that the full ones are freer by the formula."""
    cluster = [decode("d0", 5), decode("d1", 20, running=10), decode("d2", 8)]

    assert rank_destinations(cluster, {}, 10) == ["d1", "d2", "d0"]


def test_demand_on_its_way_makes_an_instance_full() -> None:
    cluster = [decode("d0", 30), decode("d1", 12, running=12)]

    assert rank_destinations(cluster, {"d0": 19}, 10) == ["d0", "d1"]
    assert rank_destinations(cluster, {"d0": 21}, 10) == ["d1", "d0"]


@given(clusters(), st.integers(1, 100))
def test_every_destination_is_ranked_once_and_those_with_room_first(
    cluster: list[InstanceLoad], num_blocks: int
) -> None:
    ranked = rank_destinations(cluster, {}, num_blocks)

    free = {
        load.instance_id: load.free_blocks for load in cluster if load.role == "decode" and not load.draining
    }
    assert sorted(ranked) == sorted(free)
    fits = [free[name] >= num_blocks for name in ranked]
    assert fits == sorted(fits, reverse=True)


@given(clusters())
def test_the_order_of_the_reports_does_not_matter(cluster: list[InstanceLoad]) -> None:
    turned = [replace(load) for load in reversed(cluster)]

    assert rank_destinations(turned, {}, 1) == rank_destinations(cluster, {}, 1)
    assert choose_prefill(turned, {}) == choose_prefill(cluster, {})
