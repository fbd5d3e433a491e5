"""Which instance gives a request to which."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from router.freeness import freeness
from router.load import InstanceLoad
from router.plugins import PolicyChoice
from router.policies import PolicySet, policy_set
from router.rescheduling import RESCHEDULING, MoveOrder
from router.rescheduling.gain import freeness_or_deficit
from tests.unit.router.made_loads import clusters, prefill
from tests.unit.router.toy_cluster import Instance, Request, ToyCluster

PAPER = policy_set("llumnix-paper")
OURS = policy_set("llumnix")
BOTH = pytest.mark.parametrize("policies", [PAPER, OURS], ids=["paper", "ours"])

#: Real values: an A10 with LLaMA-7B has 851 blocks.
FULL = InstanceLoad("full", "neutral", total_blocks=851, free_blocks=20, running=30, watermark_blocks=8)
FREE = InstanceLoad("free", "neutral", total_blocks=851, free_blocks=600, running=10, watermark_blocks=8)
QUEUED = replace(FULL, waiting=1, head_of_line_blocks=150, waiting_blocks=150)
HALF = InstanceLoad("half", "neutral", total_blocks=851, free_blocks=400, running=20, watermark_blocks=8)


def moves(policies: object, *loads: InstanceLoad) -> list[MoveOrder]:
    return RESCHEDULING.make(policies.choice("rescheduling")).moves(loads, policies)  # type: ignore[attr-defined]


def pairs(found: list[MoveOrder]) -> list[tuple[str, str]]:
    return [(move.source, move.destination.instance_id) for move in found]


# ---- it acts under default settings


@BOTH
def test_an_imbalanced_pair_is_moved(policies: object) -> None:
    assert ("full", "free") in pairs(moves(policies, FREE, FULL))
    assert {move.reason for move in moves(policies, FREE, FULL)} == {"balance"}


@BOTH
def test_a_balanced_pair_is_left_alone(policies: object) -> None:
    assert moves(policies, HALF, replace(HALF, instance_id="other")) == []
    assert moves(policies, FULL, replace(FULL, instance_id="other")) == []
    assert moves(policies, FREE, replace(FREE, instance_id="other")) == []


@BOTH
def test_a_queued_request_that_does_not_fit_is_made_room_for(policies: object) -> None:
    """There are enough free blocks in the cluster, but not on one instance: de-fragmentation."""
    queued = replace(HALF, instance_id="queued", waiting=1, head_of_line_blocks=420, waiting_blocks=420)
    found = moves(policies, queued, FREE)

    assert set(pairs(found)) == {("queued", "free")}
    assert found[0].reason == "defragment"


@BOTH
def test_preempted_requests_make_a_source(policies: object) -> None:
    preempted = replace(HALF, instance_id="preempted", preempted=1, free_blocks=80)
    found = moves(policies, preempted, FREE)

    assert found
    assert found[0].reason == "defragment"


@BOTH
def test_a_draining_instance_is_emptied_by_its_own_rule(policies: object) -> None:
    found = moves(policies, replace(FREE, instance_id="leaving", draining=True), HALF)

    assert found
    assert {
        (*pair, move.reason, move.selection.name) for pair, move in zip(pairs(found), found, strict=True)
    } == {("leaving", "half", "drain", "drain")}


@BOTH
def test_high_priority_makes_room_around_itself(policies: object) -> None:
    assert pairs(moves(policies, replace(HALF, high_priority=1), FREE))[0] == ("half", "free")


def test_the_policy_none_orders_no_moves() -> None:
    assert RESCHEDULING.make(PolicyChoice("none")).moves([FULL, FREE], PAPER) == []


# ---- always


@BOTH
@given(cluster=clusters())
def test_sources_have_a_reason_and_destinations_are_freer_of_the_same_pool(
    policies: PolicySet, cluster: list[InstanceLoad]
) -> None:
    by_id = {load.instance_id: load for load in cluster}
    found = moves(policies, *cluster)
    for move in found:
        source, destination = by_id[move.source], by_id[move.destination.instance_id]
        assert source.running
        assert source.draining or source.preempted or freeness(source) < policies.migration_threshold
        assert source.role == destination.role != "prefill"
        assert not destination.draining
        assert source is not destination
        assert source.draining or freeness(destination) > policies.migration_threshold
    assert not {move.source for move in found} & {move.destination.instance_id for move in found}
    most = Counter(move.source for move in found) + Counter(move.destination.instance_id for move in found)
    assert max(most.values(), default=0) <= 1


@BOTH
@given(cluster=clusters())
def test_the_order_of_the_reports_does_not_matter(policies: object, cluster: list[InstanceLoad]) -> None:
    assert Counter(pairs(moves(policies, *cluster))) == Counter(pairs(moves(policies, *cluster[::-1])))


@BOTH
def test_pools_do_not_mix_and_prefill_instances_are_none(policies: object) -> None:
    full = [replace(FULL, instance_id=f"full {role}", role=role) for role in ("neutral", "decode", "prefill")]
    assert moves(policies, *full, prefill("p0"), replace(FREE, role="prefill")) == []

    found = moves(policies, *full, replace(FREE, role="decode"))
    assert set(pairs(found)) == {("full decode", "free")}


# ---- the pairs


@BOTH
@given(cluster=clusters("neutral"))
def test_the_least_free_is_paired_with_the_freest(policies: PolicySet, cluster: list[InstanceLoad]) -> None:
    cluster = [load for load in cluster if not load.draining]
    found = moves(policies, *cluster)
    by_id = {load.instance_id: load for load in cluster}
    sources = [freeness(by_id[move.source]) for move in found]
    destinations = [freeness(move.destination) for move in found]

    assert sources == sorted(sources)
    assert destinations == sorted(destinations, reverse=True)
    threshold = policies.migration_threshold
    freer = [freeness(load) for load in cluster if not load.preempted and freeness(load) > threshold]
    assert destinations == sorted(freer, reverse=True)[: len(found)]


def test_a_draining_instance_gives_to_any_with_space_if_none_is_freer() -> None:
    leaving = replace(FULL, instance_id="leaving", draining=True)
    tight = InstanceLoad(
        "tight", "neutral", total_blocks=851, free_blocks=100, running=40, watermark_blocks=8
    )
    assert freeness(tight) < PAPER.migration_threshold

    assert pairs(moves(PAPER, leaving, tight, FULL)) == [("leaving", "tight")]
    assert moves(PAPER, leaving, FULL) == []


def test_the_paper_leaves_instances_with_a_migration_in_flight_alone() -> None:
    assert moves(PAPER, replace(FULL, migrating_out=1), FREE) == []
    assert moves(PAPER, FULL, replace(FREE, migrating_in=1)) == []


def test_the_default_goes_on_giving_until_max_moves_are_in_flight() -> None:
    assert pairs(moves(OURS, replace(QUEUED, migrating_out=OURS.max_moves - 1), FREE)) == [("full", "free")]
    assert moves(OURS, replace(QUEUED, migrating_out=OURS.max_moves), FREE) == []


def test_arrivals_at_a_decode_instance_are_hand_offs_and_no_reason_to_wait() -> None:
    full, free = replace(FULL, role="decode"), replace(FREE, role="decode", migrating_in=3)

    assert pairs(moves(PAPER, full, free)) == [("full", "free")]


# ---- rounds under constant load


@st.composite
def toys(draw: st.DrawFn) -> dict[str, Instance]:
    toys = {}
    for number in range(draw(st.integers(2, 4))):
        sizes: list[int] = []
        for size in draw(st.lists(st.integers(1, 60), max_size=12)):
            if sum(sizes) + size <= 100:
                sizes.append(size)
        requests = [
            Request(f"{number}.{index}", size, draw(st.sampled_from([0, 0, 0, -1])))
            for index, size in enumerate(sizes)
        ]
        head = draw(st.sampled_from([0, 0, 10, 80]))
        toys[f"i{number}"] = Instance(100, requests, head)
    return toys


@pytest.mark.parametrize("selection", ["guarded", "levelling"])
@pytest.mark.parametrize("threshold", [3.0, 20.0])
@pytest.mark.parametrize("max_moves", [1, 4])
@given(instances=toys())
def test_under_constant_load_moves_come_to_an_end_and_nothing_goes_back_and_forth(
    selection: str, threshold: float, max_moves: int, instances: dict[str, Instance]
) -> None:
    policies = policy_set("llumnix", selection=selection, migration_threshold=threshold, max_moves=max_moves)
    toy = ToyCluster(instances)
    before = sorted(freeness_or_deficit(instance.load(name)) for name, instance in instances.items())
    toy.run(policies, 30)
    made = len(toy.moves)
    toy.run(policies, 10)

    assert len(toy.moves) == made, "still moving"
    journeys = Counter((request.name, destination) for request, _, destination, _ in toy.moves)
    assert max(journeys.values(), default=0) <= 1, "a request has come back"
    assert not any(request.priority < 0 for request, *_ in toy.moves)
    if max_moves == 1:  # several at once count with average sizes until they are there
        after = sorted(freeness_or_deficit(instance.load(name)) for name, instance in instances.items())
        assert after >= before


def test_the_papers_rule_can_swing() -> None:
    """Why ours has a guard: two instances on either side of the threshold pass one request to and fro."""
    instances = {
        "i0": Instance(100, [Request("a", 30), *(Request(f"a{n}", 31) for n in range(2))]),
        "i1": Instance(100, [Request(f"b{n}", 33) for n in range(2)]),
    }
    toy = ToyCluster(instances).run(policy_set("llumnix-paper", migration_threshold=5), 10)
    assert Counter(request.name for request, *_ in toy.moves)["a"] > 2

    assert not ToyCluster(instances).run(policy_set("llumnix", migration_threshold=5), 10).moves


@BOTH
def test_a_drained_instance_ends_empty_of_high_priority_too(policies: object) -> None:
    requests = [Request(f"r{n}", 5, -(n % 2)) for n in range(10)]
    instances = {
        "i0": Instance(400, requests, draining=True),
        "i1": Instance(400, []),
        "i2": Instance(400, []),
    }
    toy = ToyCluster(instances).run(policies, 40)  # type: ignore[arg-type]

    assert instances["i0"].requests == []
    assert {reason for *_, reason in toy.moves if reason != "balance"} == {"drain"}
