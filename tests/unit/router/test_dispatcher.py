"""Decisions between two reports."""

import math
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from router.dispatch import DispatchPolicy
from router.dispatcher import Dispatcher, QueueAhead
from router.handoff import MAX_DESTINATIONS
from router.load import InstanceLoad
from router.policies import policy_set
from router.request import NewRequest
from tests.manual_clock import ManualClock
from tests.unit.router.made_loads import decode, neutral, prefill


def dispatcher_of(*loads: InstanceLoad) -> Dispatcher:
    dispatcher = Dispatcher()
    for load in loads:
        dispatcher.loads.report(load)
    return dispatcher


# ---- dispatch


def test_of_equal_destinations_the_one_on_the_requests_machine_comes_first() -> None:
    measured = [replace(decode(f"d{i}"), block_copy_s=1e-4, far_block_copy_s=1e-2) for i in range(3)]
    dispatcher = dispatcher_of(prefill("p0"), *measured)
    assert dispatcher.destinations(10, source="p0") == ["d0", "d1", "d2"]

    dispatcher.loads.nodes |= {"p0": "b", "d0": "a", "d1": "a", "d2": "b"}
    assert dispatcher.destinations(10, source="p0") == ["d2", "d0", "d1"]
    assert dispatcher.destinations(10) == ["d0", "d1", "d2"]

    dispatcher.loads.remove("d2")
    assert dispatcher.loads.nodes.keys() == {"p0", "d0", "d1"}


def test_only_what_a_copy_to_another_machine_takes_longer_counts() -> None:
    """By the times of all: the one that has had no copy yet has no advantage, and near ones are equal."""
    measured = [replace(decode(f"d{i}"), block_copy_s=1e-3 * i, far_block_copy_s=1e-2) for i in range(3)]
    dispatcher = dispatcher_of(prefill("p0"), *measured)
    dispatcher.loads.nodes |= {"p0": "b", "d0": "a", "d1": "b", "d2": "b", "d3": "a"}
    loads = [replace(measured[0], cached_tokens=32), *measured[1:], decode("d3")]

    found = dispatcher._with_distance(loads, 12, "p0")

    assert [load.copy_s for load in found] == [
        pytest.approx(10 * 8.5e-3),
        0.0,
        0.0,
        pytest.approx(12 * 8.5e-3),
    ]
    assert dispatcher._with_distance([*loads[1:3], decode("d3")], 12, "") == [*loads[1:3], decode("d3")]


def test_a_network_as_fast_as_the_machine_changes_nothing() -> None:
    measured = [replace(decode(f"d{i}", 50 + i), block_copy_s=1e-3, far_block_copy_s=1e-3) for i in range(4)]
    dispatcher = dispatcher_of(prefill("p0"), *measured)
    before = dispatcher.destinations(10, source="p0")
    dispatcher.loads.nodes |= {"p0": "b", "d0": "b", "d1": "a", "d2": "b", "d3": "a"}

    assert dispatcher.destinations(10, source="p0") == before == ["d3", "d2", "d1", "d0"]


def test_a_burst_between_two_reports_does_not_herd() -> None:
    """All of it is decided on one report, in which both instances look idle."""
    dispatcher = dispatcher_of(prefill("p0"), prefill("p1"))

    assert Counter(dispatcher.dispatch(NewRequest(100)) for _ in range(10)) == {"p0": 5, "p1": 5}


def test_a_long_prompt_weighs_as_much_as_many_short_ones() -> None:
    dispatcher = dispatcher_of(prefill("p0"), prefill("p1"))

    chosen = [dispatcher.dispatch(NewRequest(tokens)) for tokens in (1000, 250, 250, 250, 250)]
    assert chosen == ["p0", "p1", "p1", "p1", "p1"]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40))
def test_a_burst_is_spread_to_within_its_longest_prompt(prompts: list[int]) -> None:
    dispatcher = dispatcher_of(prefill("p0"), prefill("p1"), prefill("p2"))
    backlog = Counter({"p0": 0, "p1": 0, "p2": 0})
    for tokens in prompts:
        backlog[dispatcher.dispatch(NewRequest(tokens))] += tokens

    assert max(backlog.values()) - min(backlog.values()) <= max(prompts)


def test_a_dispatch_that_a_report_has_seen_is_not_counted_twice() -> None:
    """p0 has got its request and still has all of it to compute: its report says so."""
    dispatcher = dispatcher_of(prefill("p0"), prefill("p1", waiting_tokens=150))
    assert dispatcher.dispatch(NewRequest(100)) == "p0"

    dispatcher.loads.report(prefill("p0", waiting_tokens=100, requests_added=1))

    assert dispatcher.dispatch(NewRequest(100)) == "p0"


def test_a_dispatch_that_a_report_has_not_seen_still_counts() -> None:
    """The report was on its way when the request was sent."""
    dispatcher = dispatcher_of(prefill("p0"), prefill("p1", waiting_tokens=50))
    assert dispatcher.dispatch(NewRequest(100)) == "p0"

    dispatcher.loads.report(prefill("p0", requests_added=0))

    assert dispatcher.dispatch(NewRequest(100)) == "p1"


def test_a_report_may_have_seen_a_part_of_the_dispatches() -> None:
    dispatcher = dispatcher_of(prefill("p0"), prefill("p1", waiting_tokens=1000))
    assert [dispatcher.dispatch(NewRequest(400)), dispatcher.dispatch(NewRequest(400))] == ["p0", "p0"]

    dispatcher.loads.report(
        prefill("p0", waiting_tokens=0, requests_added=1)
    )  # the first is computed, the second not there yet
    assert dispatcher.dispatch(NewRequest(500)) == "p0"  # 400 are pending

    assert dispatcher.dispatch(NewRequest(1)) == "p0"  # 900
    assert dispatcher.dispatch(NewRequest(200)) == "p0"  # 901
    assert dispatcher.dispatch(NewRequest(1)) == "p1"  # 1101


def test_counting_starts_from_what_the_instance_has_had() -> None:
    """This API server is new, or not the only one."""
    dispatcher = dispatcher_of(prefill("p0", requests_added=7), prefill("p1", waiting_tokens=50))
    assert dispatcher.dispatch(NewRequest(100)) == "p0"
    assert dispatcher.dispatch(NewRequest(100)) == "p1"

    dispatcher.loads.report(prefill("p0", requests_added=8))

    assert dispatcher.dispatch(NewRequest(10)) == "p0"


def test_without_a_candidate_dispatch_chooses_none() -> None:
    assert Dispatcher().dispatch(NewRequest(1)) is None
    assert dispatcher_of(decode("d0", draining=True)).dispatch(NewRequest(1)) is None


# ---- hand-off


def test_expected_requests_count_until_they_are_settled() -> None:
    dispatcher = dispatcher_of(decode("d0"), decode("d1", 90))
    assert dispatcher.destinations(10) == ["d0", "d1"]

    dispatcher.loads.expect("d0", "r", 30)
    assert dispatcher.destinations(10) == ["d1", "d0"]
    assert (dispatcher.loads.free_blocks("d0"), dispatcher.loads.free_blocks("d1")) == (70, 90)

    dispatcher.loads.settled("d0", "r")
    assert dispatcher.destinations(10) == ["d0", "d1"]
    assert dispatcher.loads.free_blocks("d0") == 100


def test_a_burst_of_hand_offs_is_spread() -> None:
    dispatcher = dispatcher_of(decode("d0"), decode("d1"))
    chosen = []
    for number in range(10):
        chosen.append(dispatcher.destinations(5)[0])
        dispatcher.loads.expect(chosen[-1], f"r{number}", 5)

    assert Counter(chosen) == {"d0": 5, "d1": 5}


def test_a_request_is_sent_with_the_best_destinations_of_many() -> None:
    cluster = [decode(f"d{number}", number) for number in range(100)]

    assert dispatcher_of(*cluster).destinations(5) == [f"d{99 - place}" for place in range(MAX_DESTINATIONS)]


def test_a_request_is_expected_once_with_its_latest_size() -> None:
    dispatcher = dispatcher_of(decode("d0"))
    dispatcher.loads.expect("d0", "r", 30)
    dispatcher.loads.expect("d0", "r", 40)

    assert dispatcher.loads.free_blocks("d0") == 60


def test_settling_what_is_not_expected_changes_nothing() -> None:
    dispatcher = dispatcher_of(decode("d0"))
    dispatcher.loads.expect("d0", "r", 30)
    dispatcher.loads.settled("d0", "another")
    dispatcher.loads.settled("d9", "r")
    dispatcher.loads.settled("", "r")

    assert dispatcher.loads.free_blocks("d0") == 70


# ---- reports


def test_the_latest_report_counts() -> None:
    dispatcher = dispatcher_of(decode("d0", 10), decode("d0", 20))

    assert [load.free_blocks for load in dispatcher.loads] == [20]
    assert "d0" in dispatcher.loads
    assert dispatcher.loads["d0"] is dispatcher.loads.get("d0")


def test_an_instance_that_is_removed_leaves_nothing_behind() -> None:
    """One of the same name that joins later starts from its own report."""
    dispatcher = dispatcher_of(prefill("p0"), decode("d0"))
    dispatcher.dispatch(NewRequest(1000))
    dispatcher.loads.expect("d0", "r", 50)

    dispatcher.loads.remove("p0")
    dispatcher.loads.remove("d0")

    assert list(dispatcher.loads) == []
    assert (dispatcher.loads.get("p0"), "d0" in dispatcher.loads) == (None, False)
    assert (dispatcher.dispatch(NewRequest(1)), dispatcher.destinations(1)) == (None, [])
    for load in (prefill("p0"), prefill("p1", waiting_tokens=1), decode("d0")):
        dispatcher.loads.report(load)
    assert dispatcher.dispatch(NewRequest(1)) == "p0"
    assert dispatcher.loads.free_blocks("d0") == 100


def test_removing_an_unknown_instance_changes_nothing() -> None:
    dispatcher = dispatcher_of(decode("d0"))
    dispatcher.loads.remove("d9")

    assert "d0" in dispatcher.loads


# ---- policies


def test_a_burst_on_neutral_instances_spreads_by_freeness() -> None:
    dispatcher = dispatcher_of(neutral("i0"), neutral("i1"))

    assert Counter(dispatcher.dispatch(NewRequest(160)) for _ in range(10)) == {"i0": 5, "i1": 5}


def test_a_dispatched_request_counts_like_a_reported_one() -> None:
    dispatcher = dispatcher_of(neutral("i0", requests_added=4))
    dispatcher.dispatch(NewRequest(33))
    dispatcher.dispatch(NewRequest(16))
    load = dispatcher.loads.projected("i0")

    assert (load.waiting, load.waiting_tokens, load.waiting_blocks, load.requests_added) == (2, 49, 4, 6)
    dispatcher.loads.report(load)
    assert dispatcher.loads.projected("i0") == load


def test_the_policy_set_decides() -> None:
    """Freest is i1; the shortest queue is i0's."""
    cluster = [neutral("i0", free=10), neutral("i1", waiting=1)]
    chosen = {}
    for name in ("queue", "infaas++"):
        dispatcher = Dispatcher(policy_set(name))
        for load in cluster:
            dispatcher.loads.report(load)
        chosen[name] = dispatcher.dispatch(NewRequest(16))

    assert chosen == {"queue": "i0", "infaas++": "i1"}


def test_headroom_counts_where_the_policy_set_says_so() -> None:
    cluster = [neutral("i0", total=800, free=800, high_priority=1), neutral("i1", total=800, free=700)]
    chosen = {}
    for name in ("llumnix-paper", "infaas++"):
        dispatcher = Dispatcher(policy_set(name))
        for load in cluster:
            dispatcher.loads.report(load)
        chosen[name] = dispatcher.dispatch(NewRequest(16))

    assert chosen == {"llumnix-paper": "i1", "infaas++": "i0"}


# ---- old reports


def test_an_instance_without_a_fresh_report_is_not_chosen() -> None:
    clock = ManualClock(0.0)
    dispatcher = Dispatcher(clock=clock)
    for load in (prefill("p0"), prefill("p1", 900), decode("d0"), decode("d1", 1)):
        dispatcher.loads.report(load)
    clock.now = 2.5
    dispatcher.loads.report(prefill("p1", 900))
    dispatcher.loads.report(decode("d1", 1))
    assert (dispatcher.dispatch(NewRequest(1)), dispatcher.destinations(1)[0]) == ("p0", "d0")

    clock.now = 3.5
    assert (dispatcher.dispatch(NewRequest(1)), dispatcher.destinations(1)) == ("p1", ["d1"])

    dispatcher.loads.report(prefill("p0"))
    assert dispatcher.dispatch(NewRequest(1)) == "p0"


def test_if_all_reports_are_old_the_last_ones_count() -> None:
    """Refusing everything would make an outage of a stall."""
    clock = ManualClock(0.0)
    dispatcher = Dispatcher(clock=clock)
    for load in (prefill("p0"), prefill("p1", 900), decode("d0"), decode("d1", 1)):
        dispatcher.loads.report(load)
    clock.now = 100.0

    assert (dispatcher.dispatch(NewRequest(1)), dispatcher.destinations(1)) == ("p0", ["d0", "d1"])


# ---- own policies that fail


class Fails:
    def choose(self, loads: object, request: object, rng: object) -> InstanceLoad:
        raise ZeroDivisionError

    def rank(self, loads: object, num_blocks: int, priority: int) -> list[InstanceLoad]:
        raise ZeroDivisionError


class ChoosesAnUnknownInstance:
    def choose(self, loads: object, request: object, rng: object) -> InstanceLoad:
        return neutral("i9")


@pytest.mark.parametrize("policy", [Fails(), ChoosesAnUnknownInstance()])
def test_a_built_in_policy_decides_in_the_place_of_one_that_fails(
    policy: DispatchPolicy, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = dispatcher_of(neutral("i0", 0), neutral("i1"))
    dispatcher._dispatch = policy

    assert [dispatcher.dispatch(NewRequest(100)) for _ in range(3)] == ["i1", "i1", "i1"]
    assert len(caplog.records) == 1


def test_a_built_in_policy_ranks_in_the_place_of_one_that_fails() -> None:
    dispatcher = dispatcher_of(decode("d0", 50), decode("d1", 90))
    dispatcher._handoff = Fails()

    assert dispatcher.destinations(10) == ["d1", "d0"]


# ---- prefixes


def with_prefixes(*loads: InstanceLoad) -> Dispatcher:
    dispatcher = Dispatcher(policy_set("llumnix", prefill_dispatch="prefix", handoff="prefix"))
    dispatcher.loads.prefixes.key_tokens = 16
    for load in loads:
        dispatcher.loads.report(load)
    return dispatcher


@pytest.mark.parametrize("setting", ["dispatch", "prefill_dispatch", "handoff"])
def test_what_the_instances_have_is_asked_for_if_a_policy_uses_it(setting: str) -> None:
    assert not Dispatcher().loads.prefixes.is_used
    assert Dispatcher(policy_set("llumnix", **{setting: "prefix"})).loads.prefixes.is_used


def test_a_prompt_goes_where_its_prefix_is() -> None:
    dispatcher = with_prefixes(prefill("p0"), prefill("p1", 30))
    dispatcher.loads.prefixes.add("p1", [1, 2], 100)

    assert dispatcher.dispatch(NewRequest(60, prefix_keys=(1, 2, 3))) == "p1"
    assert dispatcher.dispatch(NewRequest(60, prefix_keys=(7, 2, 3))) == "p0"


def test_a_prompt_goes_where_its_prefix_will_be() -> None:
    """Two with the same long prefix come between two reports."""
    dispatcher = with_prefixes(prefill("p0"), prefill("p1"))
    keys = tuple(range(10))
    first = dispatcher.dispatch(request := NewRequest(100, prefix_keys=keys))
    assert first is not None
    dispatcher.send_prefix(request, first)

    assert dispatcher.dispatch(NewRequest(170, prefix_keys=(*keys, 70))) == first
    assert dispatcher.dispatch(NewRequest(170, prefix_keys=(70, *keys))) != first


def test_a_hand_off_goes_where_the_blocks_are_and_not_where_they_are_expected() -> None:
    dispatcher = with_prefixes(decode("d0"), decode("d1", running=9))
    keys = tuple(range(20))
    dispatcher.loads.prefixes.expect("d1", keys)
    assert dispatcher.destinations(20, prefix_keys=keys) == ["d0", "d1"]
    dispatcher.loads.prefixes.add("d1", keys, 100)

    assert dispatcher.destinations(20, prefix_keys=keys) == ["d1", "d0"]
    assert dispatcher.destinations(20) == ["d0", "d1"]
    dispatcher.loads.remove("d1")
    assert not dispatcher.loads.prefixes.keys("d1")


# ---- prompts on decode instances, and copies of prefixes


def conditional(*loads: InstanceLoad, **settings: object) -> Dispatcher:
    dispatcher = Dispatcher(policy_set("conditional", **settings))
    dispatcher.loads.prefixes.key_tokens = 16
    for load in loads:
        measured = {"prompt_token_s": 1e-3, "decode_step_s": 0.02, "step_prompt_tokens": 256}
        dispatcher.loads.report(replace(load, **measured))  # type: ignore[arg-type]
    return dispatcher


KEYS = tuple(range(100, 140))  # of 640 tokens


def test_a_decode_instance_takes_prompts_only_where_the_policy_set_lets_it() -> None:
    loads = [prefill("p0", 5000), decode("d0")]
    assert conditional(*loads).dispatch(NewRequest(300)) == "d0"
    assert conditional(*loads, decode_prompt_tokens=0).dispatch(NewRequest(300)) == "p0"


def test_a_full_or_draining_or_avoided_decode_instance_takes_no_prompt() -> None:
    busy = prefill("p0", 5000)
    assert conditional(busy, decode("d0", 3)).dispatch(NewRequest(300)) == "p0"
    assert conditional(busy, decode("d0", draining=True)).dispatch(NewRequest(300)) == "p0"
    assert conditional(busy, decode("d0")).dispatch(NewRequest(300), avoid=["d0"]) == "p0"


def test_a_prefix_is_copied_to_where_the_prompt_starts() -> None:
    dispatcher = conditional(prefill("p0"), decode("d0"), decode_prompt_tokens=0)
    dispatcher.loads.prefixes.add("d0", KEYS, 1000)
    request = NewRequest(700, prefix_keys=KEYS)
    assert dispatcher.dispatch(request) == "p0"
    assert dispatcher.send_prefix(request, "p0") == "d0"
    assert dispatcher.loads.projected("p0").waiting_tokens == 60


def test_what_is_on_its_way_to_an_instance_is_not_copied_again() -> None:
    dispatcher = conditional(prefill("p0"), decode("d0"), decode_prompt_tokens=0)
    dispatcher.loads.prefixes.add("d0", KEYS, 1000)
    request = NewRequest(700, prefix_keys=KEYS)
    for source in ("d0", None):
        assert dispatcher.dispatch(request) == "p0"
        assert dispatcher.send_prefix(request, "p0") == source


def test_without_keys_nothing_is_copied() -> None:
    dispatcher = conditional(prefill("p0"), decode("d0"))
    assert dispatcher.send_prefix(NewRequest(700), "p0") is None


# ---- predicted first tokens

FAST, SLOW = 0.001, 0.010


def test_a_first_token_is_predicted_where_it_comes_soonest() -> None:
    dispatcher = dispatcher_of(
        prefill("p0", waiting_tokens=900, prompt_token_s=FAST), prefill("p1", prompt_token_s=SLOW)
    )

    assert dispatcher.first_token_s(NewRequest(100), {}) == pytest.approx(1.0)
    assert dispatcher.first_token_s(NewRequest(1000), {}) == pytest.approx(1.9)
    assert dispatcher.first_token_s(NewRequest(10), {}) == pytest.approx(0.1)


def test_a_prediction_counts_what_was_sent_since_the_report() -> None:
    dispatcher = dispatcher_of(prefill("p0", prompt_token_s=FAST))
    for _ in range(3):
        dispatcher.dispatch(NewRequest(1000))

    assert dispatcher.first_token_s(NewRequest(1000), {}) == pytest.approx(4.0)


def test_what_waits_behind_a_request_does_not_delay_it_and_what_is_ahead_is_shared() -> None:
    dispatcher = dispatcher_of(
        prefill("p0", waiting_tokens=1000, prompt_token_s=FAST),
        prefill("p1", waiting_tokens=5000, prompt_token_s=FAST),
    )

    assert dispatcher.first_token_s(
        NewRequest(100), {"p0": QueueAhead(600), "gone": QueueAhead(10**6)}
    ) == pytest.approx(0.5)
    assert dispatcher.first_token_s(NewRequest(100), {"p0": QueueAhead(10**6)}) == pytest.approx(0.1)
    assert dispatcher.first_token_s(NewRequest(100), {}, tokens_ahead=400) == pytest.approx(1.3)


def test_a_request_waits_at_least_as_long_as_those_before_it_have_waited() -> None:
    """Whatever they wait for; on the instance where that is shortest."""
    dispatcher = dispatcher_of(prefill("p0", prompt_token_s=FAST), prefill("p1", prompt_token_s=FAST))

    queues = {"p0": QueueAhead(0, 20.0), "p1": QueueAhead(0, 30.0)}

    assert dispatcher.first_token_s(NewRequest(100), queues) == 20.0
    assert dispatcher.first_token_s(NewRequest(100), {"p1": queues["p1"]}) == pytest.approx(0.1)


def test_a_running_batch_delays_each_step_of_a_prompt() -> None:
    load = prefill("p0", prompt_token_s=FAST, running=1, decode_step_s=0.05, step_prompt_tokens=500)

    assert dispatcher_of(load).first_token_s(NewRequest(1000), {}) == pytest.approx(1.1)


@pytest.mark.parametrize("loads", [[], [prefill("p0")], [prefill("p0", prompt_token_s=SLOW), prefill("p1")]])
def test_nothing_is_predicted_before_all_instances_have_measured_a_prompt(loads: list[InstanceLoad]) -> None:
    assert dispatcher_of(*loads).first_token_s(NewRequest(10**6), {}) is None


def test_a_prediction_decides_nothing() -> None:
    dispatcher = dispatcher_of(prefill("p0", prompt_token_s=FAST))
    for _ in range(5):
        dispatcher.first_token_s(NewRequest(1000), {})

    assert dispatcher.loads.projected("p0").waiting_tokens == 0


# ---- bounded backlogs


@pytest.mark.parametrize("role", [prefill, neutral])
def test_with_a_bounded_backlog_requests_wait_until_an_instance_has_few_prompts(
    role: Callable[..., InstanceLoad],
) -> None:
    dispatcher = Dispatcher(bounds_backlog=True)
    dispatcher.loads.report(role("i0", total=10_000, free=10_000, step_prompt_tokens=500))
    assert dispatcher.admissible_tokens("i0") == 1000
    assert [dispatcher.dispatch(NewRequest(400), may_wait=True) for _ in range(4)] == ["i0"] * 3 + [None]

    dispatcher.loads.report(
        role("i0", total=10_000, free=10_000, step_prompt_tokens=500, waiting_tokens=999, requests_added=3)
    )

    assert dispatcher.dispatch(NewRequest(10**5), may_wait=True) == "i0"
    assert dispatcher.dispatch(NewRequest(1), may_wait=True) is None
    assert dispatcher.dispatch(NewRequest(1)) == "i0", "a request that cannot wait is not refused"


def test_without_a_bound_prefill_instances_queue_everything() -> None:
    dispatcher = dispatcher_of(prefill("p0", waiting_tokens=10**6))

    assert dispatcher.dispatch(NewRequest(100), may_wait=True) == "p0"
    assert dispatcher.admissible_tokens("p0") == math.inf


# ---- sessions


def test_the_next_turn_starts_where_the_last_one_was_computed() -> None:
    dispatcher = dispatcher_of(prefill("p0"), prefill("p1"), prefill("p2"))
    first = dispatcher.dispatch(NewRequest(500, session="s"))
    assert first == "p0"
    dispatcher.loads.report(prefill("p0", requests_added=1))
    assert dispatcher.dispatch(NewRequest(100)) == "p0"

    assert dispatcher.dispatch(NewRequest(700, session="s")) == first


def test_a_session_is_no_pin() -> None:
    """A backlog outweighs cached tokens, and an instance that drains or has died is not chosen."""
    dispatcher = dispatcher_of(prefill("p0"), prefill("p1", waiting_tokens=100))
    assert dispatcher.dispatch(NewRequest(500, session="s")) == "p0"
    dispatcher.loads.report(prefill("p0", waiting_tokens=700, requests_added=1))
    dispatcher.loads.report(prefill("p1", waiting_tokens=100))
    assert dispatcher.dispatch(NewRequest(600, session="s")) == "p1"

    dispatcher.loads.report(prefill("p1", draining=True, requests_added=1))
    dispatcher.loads.report(prefill("p0", waiting_tokens=700, requests_added=1))
    assert dispatcher.dispatch(NewRequest(700, session="s")) == "p0"
    dispatcher.loads.remove("p0")
    dispatcher.loads.report(prefill("p2", waiting_tokens=5000))
    assert dispatcher.dispatch(NewRequest(700, session="s")) == "p2"


def test_what_is_known_goes_before_what_a_session_hints_at() -> None:
    dispatcher = Dispatcher(policy_set("llumnix", prefill_dispatch="prefix"))
    for load in (prefill("p0"), prefill("p1")):
        dispatcher.loads.report(load)
    dispatcher.loads.prefixes.key_tokens = 16
    assert dispatcher.dispatch(NewRequest(64, session="s")) == "p0"
    dispatcher.loads.report(prefill("p0", requests_added=1))
    dispatcher.loads.prefixes.add("p1", [1, 2, 3], 10)

    assert dispatcher.dispatch(NewRequest(100, session="s", prefix_keys=(1, 2, 3))) == "p1"
