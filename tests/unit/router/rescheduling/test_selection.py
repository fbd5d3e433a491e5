"""Which request moves."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.load import InstanceLoad
from router.plugins import PolicyChoice
from router.projected_loads import after_departures
from router.rescheduling.gain import MIN_GAIN, freeness_or_deficit
from router.rescheduling.selection import SELECTION, RequestSelector
from tests.unit.router.toy_cluster import Request

FULL = InstanceLoad("full", "neutral", total_blocks=100, free_blocks=2, running=6)
FREE = InstanceLoad("free", "neutral", total_blocks=100, free_blocks=50, running=2)

LONG = Request("long", 40, arrived_at=1.0)
MIDDLE = Request("middle", 20, arrived_at=3.0)
SHORT = Request("short", 5, arrived_at=2.0)
LOW = Request("low", 10, priority=1, arrived_at=0.0)
HIGH = Request("high", 1, priority=-1, arrived_at=9.0)
ALL = [LONG, MIDDLE, SHORT, HIGH]


def select(
    policy: str, requests: Sequence[Request], source: InstanceLoad, destination: InstanceLoad
) -> Request | None:
    return SELECTION.make(PolicyChoice(policy)).select(requests, source, destination)


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [("shortest", SHORT), ("latest", MIDDLE), ("guarded", SHORT), ("levelling", MIDDLE), ("drain", SHORT)],
)
def test_each_rule_chooses_its_own(rule: str, chosen: Request) -> None:
    assert select(rule, ALL, FULL, FREE) == chosen


@pytest.mark.parametrize("rule", SELECTION.built_in)
def test_lower_priority_goes_first(rule: str) -> None:
    assert select(rule, [*ALL, LOW], FULL, FREE) == LOW


@pytest.mark.parametrize("rule", SELECTION.built_in)
def test_high_priority_goes_in_a_drain_only(rule: str) -> None:
    assert select(rule, [HIGH], FULL, FREE) == (HIGH if rule == "drain" else None)


@pytest.mark.parametrize("rule", SELECTION.built_in)
def test_no_request_is_chosen_from_none(rule: str) -> None:
    assert select(rule, [], FULL, FREE) is None


@pytest.mark.parametrize("rule", ["guarded", "levelling"])
def test_no_request_moves_if_every_move_would_make_the_pair_worse(rule: str) -> None:
    """The only request that could go would leave the destination as full as the source is."""
    assert select(rule, [Request("huge", 49)], FULL, FREE) is None
    assert select(rule, [Request("big", 40)], FULL, FREE) is not None


def test_a_drain_leaves_requests_that_do_not_fit_for_another_destination() -> None:
    assert select("drain", [Request("huge", 51)], FULL, FREE) is None
    assert select("drain", [Request("huge", 50)], FULL, FREE) is not None


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[Request], InstanceLoad, InstanceLoad]:
    requests = [
        Request(f"r{number}", draw(st.integers(1, 40)), draw(st.sampled_from([-1, 0, 1])))
        for number in range(draw(st.integers(0, 8)))
    ]
    used = sum(request.blocks for request in requests)
    source = InstanceLoad(
        "source",
        "neutral",
        total_blocks=400,
        free_blocks=400 - used,
        running=len(requests),
        head_of_line_blocks=draw(st.integers(0, 400)),
        high_priority=sum(request.priority < 0 for request in requests),
    )
    free = draw(st.integers(0, 400))
    return (
        requests,
        source,
        InstanceLoad(
            "destination", "neutral", total_blocks=400, free_blocks=free, running=draw(st.integers(1, 9))
        ),
    )


@pytest.mark.parametrize("rule", ["guarded", "levelling"])
@given(pair=pairs())
def test_the_pair_is_never_left_worse(
    rule: str, pair: tuple[list[Request], InstanceLoad, InstanceLoad]
) -> None:
    requests, source, destination = pair
    chosen = select(rule, requests, source, destination)
    if chosen is None:
        return
    before = min(freeness_or_deficit(source), freeness_or_deficit(destination))
    source = after_departures(source).with_departures(chosen.blocks)
    after = min(freeness_or_deficit(source), freeness_or_deficit(destination.with_arrivals(chosen.blocks)))
    assert after >= before + MIN_GAIN
    assert chosen.blocks <= destination.free_blocks
    assert chosen.priority >= 0


def test_an_order_whose_policy_is_not_installed_is_refused_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    selector = RequestSelector()
    for _ in range(2):
        assert selector.select(PolicyChoice("mine"), ALL, FULL, FREE) is None

    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "full refuses moves by 'mine': PolicyError(\"no selection policy 'mine'"
    ]
    assert selector.select(PolicyChoice("shortest"), ALL, FULL, FREE) == SHORT


def test_an_order_whose_policy_fails_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    broken = [Request("no number", None)]  # type: ignore[arg-type]

    assert RequestSelector().select(PolicyChoice("shortest"), [*ALL, *broken], FULL, FREE) is None
    assert "full refuses moves by 'shortest': TypeError" in caplog.text
