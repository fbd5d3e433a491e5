"""Where a request starts: each policy chooses the best by its own metric, from those that may be chosen."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.dispatch import DISPATCH, can_start, candidates
from router.dispatch.prefix import LongestPrefix
from router.dispatch.round_robin import RoundRobin
from router.dispatch.shortest_queue import PowerOfTwo
from router.freeness import dispatch_freeness
from router.load import InstanceLoad
from router.plugins import PolicyChoice
from router.request import PREFIX_TOKENS, NewRequest
from tests.unit.router.made_loads import clusters, decode, neutral, prefill, scaled

RNG = random.Random(0)
REQUEST = NewRequest(100)


def choose(policy: str, *loads: InstanceLoad) -> str | None:
    chosen = DISPATCH.make(PolicyChoice(policy)).choose(loads, REQUEST, RNG)  # type: ignore[index]
    return chosen and chosen.instance_id


# ---- who may be chosen


@pytest.mark.parametrize(("role", "starts"), [("prefill", True), ("neutral", True), ("decode", False)])
def test_new_requests_go_to_prefill_and_neutral_instances(role: str, starts: bool) -> None:
    load = InstanceLoad("i0", role, total_blocks=100, free_blocks=100)

    assert can_start(load) is starts
    assert candidates([load]) == ([load] if starts else [])


def test_neutral_instances_take_them_where_there_are_no_prefill_instances() -> None:
    assert candidates([neutral("n0"), prefill("p0"), decode("d0")]) == [prefill("p0")]
    assert candidates([neutral("n0"), prefill("p0", draining=True)]) == [neutral("n0")]


@given(clusters())
def test_no_candidate_drains(cluster: list[InstanceLoad]) -> None:
    assert not any(load.draining or load.role == "decode" for load in candidates(cluster))
    assert len({load.role for load in candidates(cluster)}) <= 1


# ---- all policies

METRICS = {
    "round-robin": lambda load: load.requests_added,
    "queue": lambda load: load.waiting,
    "freest": lambda load: -dispatch_freeness(load),
    "backlog": lambda load: load.waiting_tokens,
    "prefix": lambda load: load.waiting_tokens,  # of a prompt that nobody knows
}


@pytest.mark.parametrize("policy", METRICS)
@given(cluster=clusters())
def test_nobody_is_better_by_the_policys_metric(policy: str, cluster: list[InstanceLoad]) -> None:
    chosen = choose(policy, *cluster)

    assert (chosen is None) == (not cluster)
    for load in cluster:
        if load.instance_id == chosen:
            assert METRICS[policy](load) == min(map(METRICS[policy], cluster))


@pytest.mark.parametrize("policy", METRICS)
@given(cluster=clusters(), factor=st.integers(2, 5))
def test_the_choice_does_not_depend_on_scale(policy: str, cluster: list[InstanceLoad], factor: int) -> None:
    assert choose(policy, *(scaled(load, factor) for load in cluster)) == choose(policy, *cluster)


@pytest.mark.parametrize("policy", METRICS)
@given(cluster=clusters(), seed=st.integers(0, 3))
def test_the_order_of_the_reports_does_not_matter(
    policy: str, cluster: list[InstanceLoad], seed: int
) -> None:
    shuffled = random.Random(seed).sample(cluster, len(cluster))

    assert choose(policy, *shuffled) == choose(policy, *cluster)


@pytest.mark.parametrize("policy", DISPATCH.built_in)
def test_nobody_is_none(policy: str) -> None:
    assert choose(policy) is None


# ---- each


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


@given(clusters(least=2), st.integers(0, 1000))
def test_the_longest_queue_is_never_one_of_two_choices_alone(cluster: list[InstanceLoad], seed: int) -> None:
    chosen = PowerOfTwo().choose(cluster, REQUEST, random.Random(seed))

    assert chosen is not None
    assert sum(load.waiting >= chosen.waiting for load in cluster) >= 2


def test_two_choices_are_random() -> None:
    cluster = [neutral(f"i{number}", waiting=number) for number in range(4)]
    chosen = Counter(choose("p2c", *cluster) for _ in range(200))

    assert set(chosen) == {"i0", "i1", "i2"}
    assert chosen["i0"] > chosen["i1"] > chosen["i2"]


def test_backlog_ties_go_to_the_smaller_batch_then_by_name() -> None:
    assert choose("backlog", prefill("p0", running=2), prefill("p1", running=1)) == "p1"
    assert choose("backlog", prefill("p0", running=1), prefill("p1", waiting=2)) == "p0"
    assert choose("backlog", prefill("p1"), prefill("p0")) == "p0"


# ---- prefixes


def prompt(*keys: int) -> NewRequest:
    return NewRequest((len(keys) + 1) * PREFIX_TOKENS, prefix_keys=keys)


def pool(*backlogs: int) -> list[InstanceLoad]:
    return [prefill(f"p{number}", tokens) for number, tokens in enumerate(backlogs)]


def chosen_by(policy: LongestPrefix, loads: list[InstanceLoad], request: NewRequest) -> str | None:
    chosen = policy.choose(loads, request, RNG)
    return chosen and chosen.instance_id


def test_who_holds_the_longest_prefix_is_preferred() -> None:
    policy = LongestPrefix()
    assert chosen_by(policy, pool(0, 1), prompt(1)) == "p0"
    assert chosen_by(policy, pool(1, 0), prompt(1, 2)) == "p0"
    assert chosen_by(policy, pool(1000, 0), prompt(1, 2, 3)) == "p1"  # not at any price

    assert chosen_by(policy, pool(1, 0), prompt(1, 2)) == "p1"
    assert chosen_by(policy, pool(128, 0), prompt(1, 9)) == "p1"
    assert chosen_by(policy, pool(0, 128), prompt(1, 2, 3)) == "p0"  # the saving just equals the backlog
    assert chosen_by(policy, pool(0, 127), prompt(5)) == "p0"  # an unknown prompt


def test_only_what_is_the_same_from_the_beginning_needs_no_computing() -> None:
    policy = LongestPrefix()
    chosen_by(policy, pool(0, 1), prompt(1, 2))

    assert policy.work(prefill("p0"), prompt(7, 8)) == 3 * PREFIX_TOKENS
    assert policy.work(prefill("p0"), prompt(1, 7)) == 2 * PREFIX_TOKENS
    assert policy.work(prefill("p0"), prompt(1, 2)) == PREFIX_TOKENS


def test_what_does_not_fit_into_the_blocks_any_more_is_forgotten_from_its_end() -> None:
    policy = LongestPrefix()
    (load,) = pool(0)  # 100 blocks of 16 tokens hold 12 prefixes
    chosen_by(policy, [load], prompt(*range(10)))
    chosen_by(policy, [load], prompt(*range(100, 110)))

    assert policy.work(load, prompt(*range(100, 110))) == PREFIX_TOKENS
    assert policy.work(load, prompt(*range(10))) == (11 - 2) * PREFIX_TOKENS


def test_instances_that_are_gone_are_forgotten() -> None:
    policy = LongestPrefix()
    for number in range(10):
        chosen_by(policy, [prefill(f"p{number}")], prompt(number))

    assert len(policy._held) <= 2
