"""Numbers of one request and of a load, goodput, and the exit code."""

import pytest

from loadtests.answer import StreamedAnswer, StreamError
from loadtests.options import Limit
from loadtests.outcome import Outcome, as_row, exit_code, outcome, summarize
from loadtests.workload import PlannedRequest

SLO = (Limit("ttft", 0.5), Limit("tpot", 0.1))


def made(
    number: int = 0, ttft_s: float = 0.4, gap_s: float = 0.05, error: StreamError | None = None
) -> Outcome:
    """A request planned at 100 s that started 10 ms later and got 5 tokens in chunks of 1, 1, 2 and 1."""
    times = [100 + ttft_s + gap_s * n for n in range(4)]
    answer = StreamedAnswer(token_ids=[1, 2, 3, 4, 5], times_s=times, usage={"prompt_tokens": 9})
    return outcome(PlannedRequest(number, 7.0, "chat", 8, 5), answer, 100.0, 100.01, times[-1] + 0.01, error)


def test_times_count_from_the_planned_start() -> None:
    one = made()
    assert one.late_s == pytest.approx(0.01)
    assert one.ttft_s == pytest.approx(0.4)
    assert one.tpot_s == pytest.approx(3 * 0.05 / 4)
    assert one.gaps_s == pytest.approx([0.05] * 3)
    assert one.longest_gap_s == pytest.approx(0.05)
    assert one.e2e_s == pytest.approx(0.56)
    assert (one.tokens, one.prompt_tokens) == (5, 9)
    assert "gaps_s" not in as_row(one)


def test_a_request_without_tokens_has_no_times() -> None:
    failed = outcome(
        PlannedRequest(0, 0.0, "chat", 8, 5), StreamedAnswer(), 1.0, 1.0, 2.0, StreamError("HTTP 503", "busy")
    )
    assert (failed.ttft_s, failed.tpot_s, failed.longest_gap_s, failed.gaps_s) == (None, None, None, [])
    assert (failed.error, failed.detail, failed.prompt_tokens) == ("HTTP 503", "busy", 8)
    assert not failed.is_good(())


@pytest.mark.parametrize(
    ("one", "good"),
    [
        (made(), True),
        (made(ttft_s=0.6), False),
        (made(gap_s=0.2), False),
        (made(error=StreamError("a token is lost")), False),
    ],
)
def test_a_good_request_did_not_fail_and_is_within_all_limits(one: Outcome, good: bool) -> None:
    assert one.is_good(SLO) is good


def test_a_request_with_one_token_has_no_tpot() -> None:
    answer = StreamedAnswer(token_ids=[1], times_s=[0.2])
    one = outcome(PlannedRequest(0, 0.0, "chat", 8, 1), answer, 0.0, 0.0, 0.2, None)
    assert one.tpot_s is None
    assert one.is_good(SLO)


def test_the_summary_counts_failures_and_good_requests() -> None:
    outcomes = [made(n, ttft_s=0.1 * (n + 1)) for n in range(9)] + [made(9, error=StreamError("HTTP 429"))]
    summary = summarize(outcomes, SLO, 10)
    assert (summary["ended"], summary["failed"], summary["failures"]) == (10, 1, {"HTTP 429": 1})
    ttft = summary["latencies_ms"]["ttft"]
    assert (ttft["mean"], ttft["p50"], ttft["max"]) == pytest.approx((500.0, 500.0, 900.0))
    assert summary["latencies_ms"]["itl"]["p99"] == pytest.approx(50.0)
    assert summary["duration_s"] == pytest.approx(7 + 0.9 + 0.15 + 0.01)
    assert (summary["goodput"]["good"], summary["goodput"]["share"]) == (5, 0.5)
    assert summary["goodput"]["requests_per_s"] == pytest.approx(5 / summary["duration_s"], abs=1e-3)
    assert summary["by_priority_ms"]["high"]["ttft"]["p50"] is None


@pytest.mark.parametrize(
    ("outcomes", "planned", "goodput", "code"),
    [
        ([made()], 1, None, 0),
        ([made()], 1, 1.0, 0),
        ([made(), made(ttft_s=1.0)], 2, 0.5, 0),
        ([made(), made(ttft_s=1.0)], 2, 0.6, 3),
        ([made(), made(error=StreamError("a token is lost"))], 2, 0.5, 1),
        ([made()], 2, None, 1),
        ([], 0, None, 1),
    ],
)
def test_the_exit_code_names_failures_and_a_missed_slo(
    outcomes: list[Outcome], planned: int, goodput: float | None, code: int
) -> None:
    assert exit_code(summarize(outcomes, SLO, planned), goodput) == code
