"""Freest instance, least backlog, shortest queue, and the shorter queue of two."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from router.dispatch.least_loaded import Freest, LeastBacklog, PowerOfTwo, ShortestQueue
from router.load import InstanceLoad
from router.request import NewRequest
from tests.unit.router.made_loads import clusters, neutral, prefill

RNG = random.Random(0)
REQUEST = NewRequest(100)


def least_backlog(*loads: InstanceLoad) -> str | None:
    chosen = LeastBacklog().choose(loads, REQUEST, RNG)
    return chosen and chosen.instance_id


def test_backlog_ties_go_to_the_smaller_batch_then_by_name() -> None:
    assert least_backlog(prefill("p0", running=2), prefill("p1", running=1)) == "p1"
    assert least_backlog(prefill("p0", running=1), prefill("p1", waiting=2)) == "p0"
    assert least_backlog(prefill("p1"), prefill("p0")) == "p0"


def test_among_equal_queues_the_smaller_batch_wins() -> None:
    cluster = [neutral("i0", running=2), neutral("i1", running=1), neutral("i2", running=0, waiting=1)]
    chosen = ShortestQueue().choose(cluster, REQUEST, RNG)

    assert chosen is cluster[1]


@given(clusters(least=2), st.integers(0, 1000))
def test_the_longest_queue_is_never_one_of_two_choices_alone(cluster: list[InstanceLoad], seed: int) -> None:
    chosen = PowerOfTwo().choose(cluster, REQUEST, random.Random(seed))

    assert chosen is not None
    assert sum(load.waiting >= chosen.waiting for load in cluster) >= 2


def test_two_choices_are_random() -> None:
    cluster = [neutral(f"i{number}", waiting=number) for number in range(4)]
    counts = Counter(
        chosen.instance_id for _ in range(200) if (chosen := PowerOfTwo().choose(cluster, REQUEST, RNG))
    )

    assert set(counts) == {"i0", "i1", "i2"}
    assert counts["i0"] > counts["i1"] > counts["i2"]


def test_the_instance_with_the_most_free_blocks_per_request_is_chosen() -> None:
    crowded, roomy = neutral("i0", free=60, running=6), neutral("i1", free=40, running=2)

    assert Freest().choose([crowded, roomy], REQUEST, RNG) is roomy


def test_blocks_of_queued_requests_are_not_free() -> None:
    queued, idle = neutral("i0", free=60, waiting=1, waiting_blocks=50), neutral("i1", free=40)

    assert Freest().choose([queued, idle], REQUEST, RNG) is idle


def test_among_equally_free_instances_the_first_by_name_is_chosen_in_any_order() -> None:
    a, b = neutral("a"), neutral("b")

    assert Freest().choose([b, a], REQUEST, RNG) is Freest().choose([a, b], REQUEST, RNG) is a


def test_without_instances_no_freest_is_chosen() -> None:
    assert Freest().choose([], REQUEST, RNG) is None
