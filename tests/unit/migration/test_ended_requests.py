"""Requests that an engine has ended a short while ago."""

import pytest

from migration import ended_requests
from migration.ended_requests import REPORTED_S, EndedRequests
from migration.messages import RequestId
from tests.manual_clock import ManualClock


def test_an_ended_request_is_kept_for_a_bounded_time() -> None:
    clock = ManualClock(100.0)
    ended = EndedRequests(clock)
    ended.add(RequestId("a"), "client", 3, [1, 2], "stop", 7)
    clock.now += REPORTED_S / 2
    ended.add(RequestId("b"), "client", 0, [3], "length")

    kept = ended.get(RequestId("a"))
    assert kept is not None
    assert (kept.epoch, kept.output_token_ids, kept.finish_reason, kept.stop_reason) == (3, [1, 2], "stop", 7)
    clock.now += REPORTED_S / 2 + 0.1
    assert [request.request_id for request in ended] == ["b"]
    assert ended.get(RequestId("a")) is None


def test_the_number_of_ended_requests_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ended_requests, "MAX_KEPT", 3)
    ended = EndedRequests(ManualClock(100.0))

    for number in range(10):
        ended.add(RequestId(str(number)), "client", 0, [], "length")

    assert [request.request_id for request in ended] == ["7", "8", "9"]


def test_a_request_that_ends_again_replaces_its_first_end() -> None:
    ended = EndedRequests(ManualClock(100.0))
    ended.add(RequestId("a"), "client", 0, [1], "length")
    ended.add(RequestId("b"), "client", 0, [1], "length")

    ended.add(RequestId("a"), "client", 1000, [1, 2], "stop")

    assert [(request.request_id, request.epoch) for request in ended] == [("b", 0), ("a", 1000)]


def test_requests_that_are_kept_longer_are_not_reported_longer() -> None:
    clock = ManualClock(100.0)
    ended = EndedRequests(clock, 60.0)
    ended.add(RequestId("a"), "client", 0, [1], "length")
    clock.now += 30.0
    ended.add(RequestId("b"), "client", 0, [1], "length")

    assert [request.request_id for request in ended.reported()] == ["b"]
    assert [request.request_id for request in ended] == ["a", "b"]
    clock.now += 31.0
    assert [request.request_id for request in ended] == ["b"]


def test_a_request_is_adopted_once_unless_its_client_lives() -> None:
    ended = EndedRequests(ManualClock(100.0))
    ended.add(RequestId("mine-1"), "gone", 4, [1, 2], "stop", 7)

    assert ended.adopt(RequestId("mine-2"), "new", {"gone"}) is None
    assert ended.adopt(RequestId("other-2"), "new", set()) is None
    assert ended.adopt(RequestId("mine-2"), "new", {"new"}) == "mine-1"
    assert ended.adopt(RequestId("mine-3"), "newer", {"new", "newer"}) is None
    (kept,) = ended
    assert (kept.request_id, kept.client, kept.epoch, kept.output_token_ids) == ("mine-2", "new", 0, [1, 2])
    assert (kept.finish_reason, kept.stop_reason) == ("stop", 7)
