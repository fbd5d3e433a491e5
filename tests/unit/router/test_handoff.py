"""Where a request is handed off to."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from router.freeness import freeness
from router.handoff import FreestDestination, HolderDestination, can_receive
from router.load import InstanceLoad
from tests.unit.router.made_loads import clusters, decode, neutral, prefill, scaled


def destinations(loads: list[InstanceLoad], num_blocks: int, priority: int = 0) -> list[InstanceLoad]:
    return FreestDestination().rank(can_receive(loads), num_blocks, priority)


def names(loads: list[InstanceLoad], num_blocks: int) -> list[str]:
    return [load.instance_id for load in destinations(loads, num_blocks)]


def test_decode_and_neutral_instances_that_do_not_drain_are_destinations() -> None:
    cluster = [prefill("p0"), neutral("n0", draining=True), replace(decode("d0"), draining=True)]

    assert names(cluster, 1) == []
    assert names([*cluster, decode("d1", 50), neutral("n1", 90)], 1) == ["n1", "d1"]


def test_the_freest_comes_first() -> None:
    cluster = [decode("d0", 50, running=5), decode("d1", 50, running=2), decode("d2", 100, running=0)]

    assert names(cluster, 10) == ["d2", "d1", "d0"]


def test_the_freest_is_the_one_that_is_so_with_the_request() -> None:
    """An idle instance with little room is the freest, until it would have to take a long request."""
    cluster = [decode("d0", 30, running=0), decode("d1", 60, running=3)]

    assert names(cluster, 1) == ["d0", "d1"]
    assert names(cluster, 25) == ["d1", "d0"]


def test_arrivals_on_their_way_count() -> None:
    cluster = [decode("d0", 80), decode("d1", 60)]

    assert names(cluster, 10) == ["d0", "d1"]
    assert names([cluster[0].with_arrivals(30), cluster[1]], 10) == ["d1", "d0"]


def test_freeness_counts_for_the_share_of_the_time_that_is_not_copying() -> None:
    """256 steps of 20 ms are 5.12 s. A third of the freeness for each of 3 requests."""
    far = replace(decode("d0", 100, running=2), copy_s=5.12, decode_step_s=0.02)
    near = decode("d1", 56, running=2)

    assert names([far, near], 10) == ["d1", "d0"]
    assert names([far, replace(near, free_blocks=54)], 10) == ["d0", "d1"]
    assert names([replace(far, copy_s=0.0), near], 10) == ["d0", "d1"]


def test_a_copy_before_any_measured_step_costs_something_as_well() -> None:
    far = replace(decode("d0", 100, running=0), copy_s=0.1)

    assert names([far, decode("d1", 100, running=0)], 10) == ["d1", "d0"]


def test_a_slower_instance_is_not_better_because_fewer_of_its_steps_pass() -> None:
    slow, idle = decode("d0", 50, running=5), decode("d1", 100, running=0)
    loads = [replace(slow, copy_s=0.1, decode_step_s=0.1), replace(idle, copy_s=0.1, decode_step_s=0.01)]

    assert [load.instance_id for load in destinations(loads, 10)] == ["d1", "d0"]


def test_a_copy_makes_a_full_instance_no_freer() -> None:
    full = [replace(decode(f"d{i}", 5, running=5), copy_s=copy_s) for i, copy_s in enumerate((0.0, 9.0))]

    assert names(full, 10) == ["d0", "d1"]
    assert freeness(full[0], 10, 1) < 0


def test_full_instances_come_last_but_are_not_left_out() -> None:
    """The batch of the one with room is so large that the full ones are freer by the formula."""
    cluster = [decode("d0", 5), decode("d1", 20, running=10), decode("d2", 8)]

    assert names(cluster, 10) == ["d1", "d2", "d0"]


def test_demand_on_its_way_makes_an_instance_full() -> None:
    cluster = [decode("d0", 30), decode("d1", 12, running=12)]

    assert names([cluster[0].with_arrivals(19), cluster[1]], 10) == ["d0", "d1"]
    assert names([cluster[0].with_arrivals(21), cluster[1]], 10) == ["d1", "d0"]


@given(clusters("decode"), st.integers(1, 100))
def test_those_with_room_are_ranked_first_and_each_group_by_freeness(
    cluster: list[InstanceLoad], num_blocks: int
) -> None:
    ranked = destinations(cluster, num_blocks)

    assert {load.instance_id for load in ranked} == {
        load.instance_id for load in cluster if not load.draining
    }
    order = [
        (load.free_blocks < num_blocks, -freeness(load.with_arrivals(num_blocks)), load.instance_id)
        for load in ranked
    ]
    assert order == sorted(order)


@given(clusters("decode"), st.integers(1, 100), st.integers(2, 5))
def test_the_order_does_not_depend_on_scale(
    cluster: list[InstanceLoad], num_blocks: int, factor: int
) -> None:
    larger = [scaled(load, factor) for load in cluster]

    assert names(larger, num_blocks * factor) == names(cluster, num_blocks)


@given(clusters())
def test_the_order_of_the_reports_does_not_matter(cluster: list[InstanceLoad]) -> None:
    assert names(cluster[::-1], 1) == names(cluster, 1)


def test_high_priority_shares_an_instance_and_others_keep_away_from_it() -> None:
    """Two thirds free, but headroom claims more than that."""
    hosts = InstanceLoad("hosts", "decode", total_blocks=851, free_blocks=800, running=2, high_priority=2)
    other = InstanceLoad("other", "decode", total_blocks=851, free_blocks=600, running=5)

    assert [load.instance_id for load in destinations([hosts, other], 10)] == ["other", "hosts"]
    ranked = destinations([hosts, other], 10, priority=-1)
    assert [load.instance_id for load in ranked] == ["hosts", "other"]


def holder(name: str, cached: int, free: int = 100, running: int = 1) -> InstanceLoad:
    return replace(decode(name, free, running), cached_tokens=cached)


def ranked(*loads: InstanceLoad, num_blocks: int = 50) -> list[str]:
    return [load.instance_id for load in HolderDestination().rank(loads, num_blocks, 0)]


def test_the_instance_with_most_of_the_blocks_comes_first() -> None:
    assert ranked(holder("d0", 0), holder("d1", 512, running=9), holder("d2", 1024, running=50)) == [
        "d2",
        "d1",
        "d0",
    ]


def test_an_instance_without_room_comes_last_whatever_it_has() -> None:
    assert ranked(holder("d0", 4096, free=49), holder("d1", 0), holder("d2", 512))[-1] == "d0"


def test_a_few_blocks_are_not_worth_it() -> None:
    assert ranked(holder("d0", 255, running=9), holder("d1", 0)) == ["d1", "d0"]
    assert ranked(holder("d0", 256, running=9), holder("d1", 0)) == ["d0", "d1"]


@given(clusters(role="decode"), st.integers(0, 1000))
def test_without_cached_blocks_it_ranks_as_by_freeness(loads: list[InstanceLoad], num_blocks: int) -> None:
    ranked = HolderDestination().rank(loads, num_blocks, 0)

    assert ranked == FreestDestination().rank(loads, num_blocks, 0)
