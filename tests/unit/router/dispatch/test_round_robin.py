"""Round robin."""

import random
from collections import Counter

from router.dispatch.round_robin import RoundRobin
from router.request import NewRequest
from tests.unit.router.made_loads import neutral

RNG = random.Random(0)
REQUEST = NewRequest(100)


def test_round_robin_takes_turns_whatever_the_load() -> None:
    policy = RoundRobin()
    cluster = [neutral("i0", free=0, running=99), neutral("i1"), neutral("i2")]
    turns = [policy.choose(cluster, REQUEST, RNG) for _ in range(6)]

    assert [load.instance_id for load in turns if load] == ["i0", "i1", "i2"] * 2


def test_round_robin_gives_one_that_joins_late_its_share_and_no_more() -> None:
    policy = RoundRobin()
    old = [neutral("i0", requests_added=500), neutral("i1", requests_added=500)]
    for _ in range(10):
        policy.choose(old, REQUEST, RNG)
    turns = [policy.choose([*old, neutral("i2")], REQUEST, RNG) for _ in range(9)]

    assert Counter(load.instance_id for load in turns if load) == {"i0": 3, "i1": 3, "i2": 3}
