"""Where a request starts: each policy chooses the best by its own metric, from those that may be chosen."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from router.dispatch import DISPATCH, can_start, candidates
from router.freeness import dispatch_freeness
from router.load import InstanceLoad
from router.plugins import PolicyChoice
from router.request import NewRequest
from tests.unit.router.made_loads import clusters, decode, neutral, prefill, scaled

RNG = random.Random(0)
REQUEST = NewRequest(100)


def choose(policy: str, *loads: InstanceLoad) -> str | None:
    chosen = DISPATCH.make(PolicyChoice(policy)).choose(loads, REQUEST, RNG)  # type: ignore[index]
    return chosen and chosen.instance_id


# ---- candidates


@pytest.mark.parametrize(("role", "starts"), [("prefill", True), ("neutral", True), ("decode", False)])
def test_new_requests_go_to_prefill_and_neutral_instances(role: str, starts: bool) -> None:
    load = InstanceLoad("i0", role, total_blocks=100, free_blocks=100)

    assert can_start(load) is starts
    assert candidates([neutral("n0"), prefill("p0"), decode("d0")]) == [neutral("n0"), prefill("p0")]
    assert candidates([neutral("n0"), prefill("p0", draining=True)]) == [neutral("n0")]


def test_decode_instances_take_them_where_no_other_instance_is_alive() -> None:
    assert candidates([decode("d0"), prefill("p0", draining=True)]) == [decode("d0")]
    assert candidates([replace(decode("d0"), draining=True)]) == []


@given(clusters())
def test_no_candidate_drains(cluster: list[InstanceLoad]) -> None:
    assert not any(load.draining for load in candidates(cluster))
    assert len({load.role == "decode" for load in candidates(cluster)}) <= 1


# ---- all policies

METRICS = {
    "round-robin": lambda load: load.requests_added,
    "queue": lambda load: load.waiting,
    "freest": lambda load: -dispatch_freeness(load),
    "backlog": lambda load: load.waiting_tokens,
    "prefix": lambda load: load.waiting_tokens,  # of an unknown prompt
}


@pytest.mark.parametrize("policy", METRICS)
@given(cluster=clusters())
def test_no_other_instance_is_better_by_the_policys_metric(policy: str, cluster: list[InstanceLoad]) -> None:
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
def test_no_instance_is_chosen_from_none(policy: str) -> None:
    assert choose(policy) is None
