"""The latest decisions about instances."""

import asyncio

from pd_serve.comm.cluster_state import PastDecision, ScaledCount
from pd_serve.manager.decision_log import NUM_DECISIONS, DecisionLog
from tests.virtual_time import in_virtual_time


@in_virtual_time
async def test_decisions_are_listed_newest_first_with_their_age() -> None:
    log = DecisionLog(lambda: None)
    log.add("d0 is drained")
    await asyncio.sleep(2.5)
    log.add("d0 is stopped")
    await asyncio.sleep(1.0)

    assert log.latest() == [PastDecision(1.0, "d0 is stopped"), PastDecision(3.5, "d0 is drained")]


@in_virtual_time
async def test_only_the_latest_decisions_are_kept() -> None:
    log = DecisionLog(lambda: None)
    for number in range(NUM_DECISIONS + 5):
        log.add(str(number))

    kept = [decision.what for decision in log.latest()]
    assert (len(kept), kept[0], kept[-1]) == (NUM_DECISIONS, str(NUM_DECISIONS + 4), "5")


@in_virtual_time
async def test_every_decision_is_listed_before_a_change_is_announced() -> None:
    """The announcement that follows has it already."""
    announced: list[list[str]] = []
    observed: list[str] = []
    log = DecisionLog(lambda: announced.append([decision.what for decision in log.latest()]))
    log.observer = observed.append

    log.add("first")
    log.add("second")

    assert announced == [["first"], ["second", "first"]]
    assert observed == ["first", "second"]


@in_virtual_time
async def test_starts_and_stops_are_counted_by_role() -> None:
    log = DecisionLog(lambda: None)
    for action, role in (("start", "decode"), ("stop", "decode"), ("start", "decode"), ("start", "prefill")):
        log.count(action, role)

    assert log.scaled() == [
        ScaledCount("start", "decode", 2),
        ScaledCount("stop", "decode", 1),
        ScaledCount("start", "prefill", 1),
    ]
