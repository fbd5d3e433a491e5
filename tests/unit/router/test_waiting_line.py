"""Requests that no instance has room for: which go when, and where to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.dispatcher import Dispatcher
from router.fair_share import FairShare
from router.load import InstanceLoad
from router.policies import policy_set
from router.request import Demand, NewRequest
from router.slo import UNTARGETED_TTFT_S, Slo
from router.waiting_line import WaitingLine
from tests.unit.router.made_loads import neutral

LATE = policy_set("llumnix", late_binding=True, bind_after_s=0.5, max_bound=0.125)
BLOCK_TOKENS = 16


def blocks(count: int, priority: int = 0) -> NewRequest:
    return NewRequest(count * BLOCK_TOKENS, priority)


def with_free(name: str, free_blocks: int, **other: int) -> InstanceLoad:
    return InstanceLoad(name, "neutral", total_blocks=100, free_blocks=free_blocks, running=4, **other)


def line_of(*loads: InstanceLoad) -> tuple[WaitingLine, Dispatcher]:
    dispatcher = Dispatcher(LATE)
    for load in loads:
        dispatcher.loads.report(load)
    return WaitingLine(dispatcher), dispatcher


# ---- dispatch with late binding


def test_a_request_goes_where_there_is_room_even_if_another_instance_is_freer() -> None:
    _, dispatcher = line_of(
        with_free("many", 30), InstanceLoad("few", "neutral", total_blocks=100, free_blocks=20, running=1)
    )

    assert dispatcher.dispatch(blocks(10), may_wait=True) == "few"
    assert dispatcher.dispatch(blocks(25), may_wait=True) == "many"
    assert dispatcher.dispatch(blocks(11), may_wait=True) is None


def test_a_dispatched_request_takes_its_room_before_a_report_says_so() -> None:
    _, dispatcher = line_of(with_free("i0", 20))

    assert [dispatcher.dispatch(blocks(10), may_wait=True) for _ in range(3)] == ["i0", "i0", None]


def test_free_blocks_are_kept_for_the_requests_that_are_there() -> None:
    dispatcher = Dispatcher(policy_set("llumnix", kept_blocks=2))
    dispatcher.loads.report(with_free("i0", 20))

    assert dispatcher.dispatch(blocks(13), may_wait=True) is None
    assert dispatcher.dispatch(blocks(6), may_wait=True) == "i0"
    assert dispatcher.dispatch(blocks(5), may_wait=True) is None
    assert dispatcher.dispatch(blocks(4), may_wait=True) == "i0"

    dispatcher.loads.report(InstanceLoad("idle", "neutral", total_blocks=100, free_blocks=100))
    assert dispatcher.dispatch(blocks(100), may_wait=True) == "idle"


def test_a_request_that_may_not_wait_is_dispatched() -> None:
    _, dispatcher = line_of(with_free("i0", 0))

    assert dispatcher.dispatch(blocks(10)) == "i0"


def test_without_late_binding_no_request_waits() -> None:
    dispatcher = Dispatcher(policy_set("infaas++"))
    dispatcher.loads.report(with_free("i0", 0))

    assert dispatcher.dispatch(blocks(10), may_wait=True) == "i0"


def test_no_request_waits_for_prefill_instances() -> None:
    """They are short of time, not of room."""
    dispatcher = Dispatcher(LATE)
    dispatcher.loads.report(InstanceLoad("p0", "prefill", total_blocks=100, free_blocks=0, running=4))

    assert dispatcher.dispatch(blocks(10), may_wait=True) == "p0"


# ---- the line


def test_requests_that_fit_go_in_the_order_of_arrival() -> None:
    line, dispatcher = line_of(with_free("i0", 0))
    for name, size in (("a", 30), ("b", 8), ("c", 8), ("d", 8)):
        line.add(name, blocks(size), now=0.0)
    dispatcher.loads.report(with_free("i0", 20))

    assert line.take("i0", now=0.1) == ["b", "c"]
    assert list(line) == ["a", "d"]


def test_high_priority_goes_first() -> None:
    line, dispatcher = line_of(with_free("i0", 0))
    for name, priority in (("normal", 0), ("later", 5), ("high", -1)):
        line.add(name, blocks(8, priority), now=0.0)
    dispatcher.loads.report(with_free("i0", 10))

    assert line.take("i0", now=0.1) == ["high"]
    assert list(line) == ["normal", "later"]


def test_the_first_in_line_is_bound_after_a_while() -> None:
    line, _ = line_of(with_free("i0", 5), with_free("i1", 5, waiting=1, preempted=1))
    line.add("large", blocks(50), now=0.0)
    line.add("next", blocks(50), now=0.0)

    assert line.take("i1", now=0.4) == []
    assert line.take("i1", now=0.5) == ["large"]


def test_few_instances_make_room_at_a_time() -> None:
    """One of eight; of sixteen, two."""
    for number, binding, bound in ((8, 1, []), (16, 1, ["large"]), (16, 2, [])):
        loads = [with_free(f"i{i}", 5, waiting=int(i < binding)) for i in range(number)]
        line, _ = line_of(*loads)
        line.add("large", blocks(50), now=0.0)

        assert line.take("i0", now=10.0) == bound


def test_a_request_fits_beside_high_priority() -> None:
    """Headroom makes an instance the last to be chosen, not one that lets others wait."""
    line, dispatcher = line_of(
        InstanceLoad("i0", "neutral", total_blocks=300, free_blocks=0, running=4, high_priority=1)
    )
    line.add("normal", blocks(8), now=0.0)
    dispatcher.loads.report(neutral("i0", 60, 4, total=300, high_priority=1))
    dispatcher.loads.report(neutral("i1", 40, 4, total=300))

    assert line.take("i0", now=0.1) == ["normal"]
    assert dispatcher.dispatch(blocks(8), may_wait=True) == "i1"


def test_no_request_goes_to_an_instance_that_takes_none() -> None:
    line, dispatcher = line_of(with_free("i0", 0), with_free("i1", 0))
    line.add("a", blocks(1), now=0.0)
    dispatcher.loads.report(InstanceLoad("i0", "neutral", total_blocks=100, free_blocks=100, draining=True))
    dispatcher.loads.report(InstanceLoad("d0", "decode", total_blocks=100, free_blocks=100))

    assert line.take("i0", now=0.1) == line.take("d0", now=0.1) == []


def test_a_discarded_request_is_not_in_the_line() -> None:
    line, _ = line_of(with_free("i0", 0))
    line.add("a", blocks(3), now=0.0)
    line.add("b", blocks(4), now=0.0)

    line.discard("a")
    line.discard("unknown")

    assert (list(line), len(line), line.demand) == (["b"], 1, Demand(1, 4 * BLOCK_TOKENS))


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(-1, 1)), max_size=12),
    st.integers(0, 100),
    st.floats(0.0, 1.0),
)
def test_a_request_that_goes_fits_or_is_first_and_none_is_lost(
    sizes: list[tuple[int, int]], free_blocks: int, now: float
) -> None:
    line, dispatcher = line_of(neutral("i0", 0))
    for number, (size, priority) in enumerate(sizes):
        line.add(str(number), blocks(size, priority), now=0.0)
    before = list(line)
    dispatcher.loads.report(with_free("i0", free_blocks))

    taken = line.take("i0", now)

    assert sorted([*taken, *line]) == sorted(before)
    assert [name for name in before if name in taken] == taken
    needed = sum(sizes[int(name)][0] for name in taken)
    is_due = now >= LATE.bind_after_s or any(priority < 0 for _, priority in sizes)
    assert needed <= free_blocks or (len(taken) == 1 and is_due)


def test_a_long_prompt_gets_its_turn_behind_a_stream_of_high_priority() -> None:
    line, _ = line_of(with_free("i0", 4))
    line.add("long", blocks(50), now=0.0)
    bound = []
    for step in range(12):
        now = 0.1 * step
        line.add(f"high-{step}", blocks(6, -1), now=now)
        bound += line.take("i0", now)

    assert "long" in bound
    assert bound.index("long") <= 6  # due after 0.5 s


def test_a_long_prompt_gets_its_turn_beside_short_ones_that_always_fit() -> None:
    line, _ = line_of(with_free("i0", 10))
    line.add("long", blocks(50), now=0.0)
    taken = []
    for step in range(8):
        line.add(f"short-{step}", blocks(2), now=0.1 * step)
        taken += line.take("i0", now=0.1 * step)

    assert "long" in taken


def test_high_priority_that_fits_nowhere_is_bound_before_smaller_requests_take_its_room() -> None:
    line, _ = line_of(with_free("i0", 0), with_free("i1", 0))
    line.add("high", blocks(50, -1), now=0.0)
    line.add("small", blocks(3), now=0.0)

    assert line.take("i0", now=0.01) == ["high"]
    assert list(line) == ["small"]


def test_a_report_does_not_look_at_the_whole_line(monkeypatch: pytest.MonkeyPatch) -> None:
    line, dispatcher = line_of(with_free("i0", 0))
    for number in range(3000):
        line.add(str(number), blocks(20 + number % 80), now=0.0)
    dispatcher.loads.report(with_free("i0", 10))
    looks = 0
    blocks_for = InstanceLoad.blocks_for

    def counted(load: InstanceLoad, num_tokens: int) -> int:
        nonlocal looks
        looks += 1
        return blocks_for(load, num_tokens)

    monkeypatch.setattr(InstanceLoad, "blocks_for", counted)

    assert line.take("i0", now=0.1) == []
    assert looks < 200


def test_a_request_that_comes_back_waits_once() -> None:
    line, dispatcher = line_of(with_free("i0", 0))
    line.add("a", blocks(3), now=0.0)
    line.add("a", blocks(3), now=0.1)
    dispatcher.loads.report(with_free("i0", 10))

    assert (len(line), line.demand) == (1, Demand(1, 3 * BLOCK_TOKENS))
    assert line.take("i0", now=0.2) == ["a"]
    assert (len(line), line.demand) == (0, Demand(0, 0))


def test_an_empty_line_keeps_nothing_of_the_requests_that_have_left() -> None:
    line, _ = line_of(with_free("i0", 0))
    for number in range(10):
        line.add(str(number), blocks(3, priority=number % 2), now=0.0)
    for number in reversed(range(10)):
        line.discard(str(number))

    assert not line._by_priority


# ---- deadlines


def targeted(count: int, ttft_s: float, priority: int = 0) -> NewRequest:
    slo = Slo(ttft_s)
    return NewRequest(count * BLOCK_TOKENS, priority, slo=slo, arrives_later_s=-slo.lead_s)


def test_the_earliest_deadline_of_a_priority_goes_first() -> None:
    line, _ = line_of(with_free("i0", 0))
    line.add("untargeted", blocks(1), 0.0)
    line.add("loose", targeted(1, 5.0), 0.1)
    line.add("tight", targeted(1, 1.0), 0.2)
    line.add("high", blocks(1, -1), 0.3)
    line.add("low", targeted(1, 0.1, priority=5), 0.3)

    assert list(line) == ["high", "tight", "loose", "untargeted", "low"]


def test_a_request_without_target_is_not_passed_for_longer_than_its_own_deadline() -> None:
    """However tight the targets are, also those that have passed."""
    line, _ = line_of(with_free("i0", 0))
    line.add("untargeted", blocks(1), 100.0)
    line.add("before", targeted(1, 0.001), 100.0 + UNTARGETED_TTFT_S - 0.01)
    line.add("after", targeted(1, 0.001), 100.0 + UNTARGETED_TTFT_S + 0.01)

    assert list(line) == ["before", "untargeted", "after"]


def test_equal_targets_are_served_in_the_order_of_arrival() -> None:
    line, _ = line_of(with_free("i0", 0))
    for number in range(20):
        line.add(f"r{number}", targeted(1, 3.0), 5.0)

    assert list(line) == [f"r{number}" for number in range(20)]


def test_a_deadline_binds_no_instance_before_the_time_to_wait() -> None:
    """A request behind in the line that has waited for longer is due first."""
    line, _ = line_of(with_free("i0", 0), with_free("i1", 0))
    line.add("first", blocks(50), 0.0)
    line.add("tight", targeted(50, 0.1), 0.3)

    assert line.take("i0", 0.49) == []
    assert line.take("i0", 0.5) == ["first"]


def test_tokens_before_a_request_are_those_of_its_place() -> None:
    line, _ = line_of(with_free("i0", 0))
    line.add("normal", blocks(2), 0.0)
    line.add("tight", targeted(3, 1.0), 0.0)
    line.add("high", blocks(5, -1), 0.0)

    assert line.tokens_before(blocks(1), 0.1) == 10 * BLOCK_TOKENS
    assert line.tokens_before(targeted(1, 2.0), 0.1) == 8 * BLOCK_TOKENS
    assert line.tokens_before(targeted(1, 0.5), 0.1) == 5 * BLOCK_TOKENS
    assert line.tokens_before(blocks(1, -2), 0.1) == 0


def test_the_longest_wait_before_a_request_is_of_one_that_is_no_longer() -> None:
    line, _ = line_of(with_free("i0", 0))
    assert line.waited_before(blocks(2), 50.0) == 0.0
    line.add("long", blocks(9), 0.0)
    line.add("short", targeted(2, 1.0), 10.0)
    line.add("low", blocks(1, 5), 0.0)

    assert line.waited_before(blocks(2), 50.0) == 40.0
    assert line.waited_before(blocks(1), 50.0) == 0.0
    assert line.waited_before(blocks(9), 50.0) == 50.0
    assert line.waited_before(blocks(9, -1), 50.0) == 0.0


# ---- shares


def shared_line(*loads: InstanceLoad) -> tuple[WaitingLine, Dispatcher]:
    dispatcher = Dispatcher(LATE)
    for load in loads:
        dispatcher.loads.report(load)
    return WaitingLine(dispatcher, FairShare()), dispatcher


def of(account: int, count: int, priority: int = 0) -> NewRequest:
    return NewRequest(count * BLOCK_TOKENS, priority, account=account)


def test_keys_take_turns_by_the_tokens_that_they_were_served() -> None:
    line, _ = shared_line(with_free("i0", 100))
    for number in range(4):
        line.add(f"a{number}", of(0, 10), 0.0)
    line.add("b0", of(1, 20), 0.1)
    line.add("b1", of(1, 10), 0.1)

    assert line.take("i0", 0.2) == ["a0", "b0", "a1", "a2", "b1", "a3"]


def test_priority_goes_before_shares() -> None:
    line, _ = shared_line(with_free("i0", 100))
    line.add("a", of(0, 10), 0.0)
    line.add("b", of(1, 10), 0.0)
    line.add("urgent", of(0, 30, -1), 0.1)

    assert line.take("i0", 0.2) == ["urgent", "b", "a"]


def test_what_is_due_is_chosen_by_shares() -> None:
    """Two keys have requests that fit nowhere. The one that was served less binds the instance."""
    line, dispatcher = shared_line(with_free("i0", 30))
    line.add("a0", of(0, 25), 0.0)
    line.add("a1", of(0, 60), 0.0)
    line.add("b0", of(1, 60), 0.1)
    assert line.take("i0", 0.2) == ["a0"]
    dispatcher.loads.report(with_free("i0", 0))

    assert line.take("i0", 10.0) == ["b0"]


def test_tokens_before_a_request_are_those_of_its_key_and_as_many_of_each_other_one() -> None:
    line, _ = shared_line(with_free("i0", 0))
    for number in range(5):
        line.add(f"a{number}", of(0, 10), 0.0)
    line.add("b", of(1, 3), 0.0)

    assert line.tokens_before(of(0, 10), 0.1) == (50 + 3) * BLOCK_TOKENS
    assert line.tokens_before(of(1, 4), 0.1) == (3 + 7) * BLOCK_TOKENS
    assert line.tokens_before(of(2, 2), 0.1) == (2 + 2) * BLOCK_TOKENS


def test_the_wait_of_another_key_says_nothing_of_ones_own() -> None:
    line, _ = shared_line(with_free("i0", 0))
    line.add("a", of(0, 2), 0.0)
    line.add("b", of(1, 2), 30.0)

    assert line.waited_before(of(1, 2), 50.0) == 20.0
    assert line.waited_before(of(2, 2), 50.0) == 0.0
