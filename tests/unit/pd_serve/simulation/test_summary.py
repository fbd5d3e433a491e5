"""Summaries of constructed results."""

import json

import msgspec
import pytest

from pd_serve.simulation.config import TraceRequest
from pd_serve.simulation.result import RequestRecord, Sample
from pd_serve.simulation.summary import fragmentation, series, summarize
from router.priority import PriorityClass
from router.slo import Slo
from tests.unit.loadtests.experiments.made_results import record, result


def sample(free: int, heads: list[int], total: int = 100, at_s: float = 0.0) -> Sample:
    return Sample(at_s, 16, 5, len(heads), free, total, heads)


def test_the_summary_has_all_keys_and_is_json() -> None:
    summary = summarize(result([record(1, 0.05)] * 4), Slo())

    assert {
        "requests", "prefill_s", "decode_s", "request_s", "preemption_loss_s", "fragmentation", "migrations",
        "avg_instances", "by_priority", "goodput", "lost_tokens", "duplicated_tokens", "leaked_blocks",
        "wall_s",
    } <= summary.keys()  # fmt: skip
    assert json.loads(json.dumps(summary)) == summary
    assert summary["preemption_loss_s"] == 1.5
    assert summary["avg_instances"] == 12.5


def test_latencies_are_means_and_percentiles_of_the_requests() -> None:
    summary = summarize(result([record(k, 0.01 * k) for k in range(1, 101)]), Slo())

    assert summary["prefill_s"] == pytest.approx({"mean": 50.5, "p50": 50.5, "p99": 99.01})
    assert summary["decode_s"] == pytest.approx({"mean": 0.505, "p50": 0.505, "p99": 0.9901})
    assert summary["request_s"]["mean"] == pytest.approx(50.5 + 5.05)
    assert summary["longest_gap_s"]["mean"] == pytest.approx(1.01)


def test_requests_of_one_token_and_failed_ones_have_no_decode_time() -> None:
    failed = RequestRecord(TraceRequest(0, 1, 5), failed=True)
    summary = summarize(result([record(1, 0.2), record(3, 0, tokens=1), failed]), Slo())

    assert summary["decode_s"]["mean"] == pytest.approx(0.2)
    assert summary["prefill_s"]["mean"] == pytest.approx(2)
    assert (summary["requests"], summary["failed"]) == (3, 1)


def test_goodput_counts_requests_that_meet_both_bounds() -> None:
    records = [record(1, 0.05), record(6, 0.05), record(1, 0.2), record(4.9, 0.099), record(1, 0, tokens=1)]
    summary = summarize(result(records, duration_s=2), Slo(ttft_s=5, tpot_s=0.1))

    assert summary["goodput"] == 1.5  # all arrive at once: per second of the run
    assert summary["attainment"] == pytest.approx(3 / 5)


def test_goodput_is_per_second_of_the_arrivals_and_not_of_the_last_requests_tail() -> None:
    records = [record(1, 0.05, arrival_s=0.5 * number) for number in range(9)]
    records[4] = record(6, 0.05, arrival_s=2.0)

    summaries = [summarize(result(records, duration_s=duration_s), Slo()) for duration_s in (5.0, 500.0)]

    assert [summary["goodput"] for summary in summaries] == pytest.approx([2 * 8 / 9] * 2, rel=1e-5)


def test_priorities_are_reported_as_scheduled_or_by_the_given_classes() -> None:
    records = [record(1, 0.1, priority=-1), record(3, 0.1), record(5, 0.1)]

    scheduled = summarize(result(records), Slo())["by_priority"]
    told = summarize(result(records), Slo(), [PriorityClass.NORMAL, *[PriorityClass.HIGH] * 2])["by_priority"]

    assert (scheduled["high"]["requests"], scheduled["high"]["prefill_s"]["mean"]) == (1, 1)
    assert (told["high"]["requests"], told["high"]["prefill_s"]["mean"]) == (2, 4)
    assert summarize(result(records[1:]), Slo())["by_priority"]["high"]["prefill_s"]["mean"] is None


def test_latencies_are_told_by_the_length_of_the_prompt() -> None:
    records = [record(k, 0.1) for k in (1, 2, 9)]
    for one, tokens in zip(records, (256, 257, 2001), strict=True):
        one.request = msgspec.structs.replace(one.request, prompt_tokens=tokens)

    by_prompt = summarize(result(records), Slo())["by_prompt"]

    assert {name: (of["requests"], of["prefill_s"]["p99"]) for name, of in by_prompt.items()} == {
        "short": (1, 1),
        "medium": (1, 2),
        "long": (1, 9),
    }


@pytest.mark.parametrize(
    ("free", "heads", "expected"),
    [
        (50, [], 0.0),
        (0, [10], 0.0),
        (50, [10], 0.1),
        (50, [60], 0.0),  # even all of it together would not do
        (50, [30, 10, 15], 0.25),  # 10 + 15, then 30 more would be too much
        (50, [20, 30], 0.5),
    ],
)
def test_fragmentation_is_the_share_of_blocks_that_queued_requests_could_use(
    free: int, heads: list[int], expected: float
) -> None:
    assert fragmentation(sample(free, heads)) == pytest.approx(expected)


def test_fragmentation_is_the_mean_over_time() -> None:
    samples = [sample(50, [10]), sample(50, [30], at_s=1), sample(50, [], at_s=2)]
    made = result([record(1, 0.1)], samples)

    assert summarize(made, Slo())["fragmentation"] == pytest.approx(0.4 / 3, rel=1e-5)
    assert series(made)["fragmentation"] == [0.1, 0.3, 0.0]
    assert series(made)["at_s"] == [0, 1, 2]


def test_a_run_without_requests_has_a_summary() -> None:
    summary = summarize(result([], duration_s=0), Slo())

    assert (summary["goodput"], summary["attainment"], summary["avg_instances"]) == (0, None, None)


def test_a_refused_request_has_not_met_its_target_and_has_no_latency() -> None:
    refused = record(1, 0, tokens=0)
    refused.refused = True

    summary = summarize(result([record(1, 0.05), refused]), Slo())

    assert (summary["attainment"], summary["refused"], summary["failed"]) == (0.5, 1, 0)
