"""Requests that an engine has ended a short while ago."""

import pytest

from migration import ended_requests
from migration.ended_requests import KEPT_S, EndedRequests


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_an_ended_request_is_kept_for_a_bounded_time() -> None:
    clock = Clock()
    ended = EndedRequests(clock)
    ended.add("a", "client", 3, [1, 2], "stop", 7)
    clock.now += KEPT_S / 2
    ended.add("b", "client", 0, [3], "length")

    kept = ended.get("a")
    assert kept is not None
    assert (kept.epoch, kept.output_token_ids, kept.finish_reason, kept.stop_reason) == (3, [1, 2], "stop", 7)
    clock.now += KEPT_S / 2 + 0.1
    assert [request.request_id for request in ended] == ["b"]
    assert ended.get("a") is None


def test_the_number_of_ended_requests_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ended_requests, "MAX_KEPT", 3)
    ended = EndedRequests(Clock())

    for number in range(10):
        ended.add(str(number), "client", 0, [], "length")

    assert [request.request_id for request in ended] == ["7", "8", "9"]


def test_a_request_that_ends_again_replaces_its_first_end() -> None:
    ended = EndedRequests(Clock())
    ended.add("a", "client", 0, [1], "length")
    ended.add("b", "client", 0, [1], "length")

    ended.add("a", "client", 1000, [1, 2], "stop")

    assert [(request.request_id, request.epoch) for request in ended] == [("b", 0), ("a", 1000)]
