"""The numbers of a load on the terminal."""

import argparse

from loadtests.options import LoadOptions, add_to
from loadtests.report.text import summary_lines
from tests.unit.loadtests.report.made_report import load_result


def options(*arguments: str) -> LoadOptions:
    parser = argparse.ArgumentParser()
    add_to(parser)
    parser.add_argument("--run-time", type=int)  # Locust's own
    return LoadOptions.from_parsed(parser.parse_args(arguments))


def test_the_lines_have_failures_latencies_and_goodput() -> None:
    text = "\n".join(
        summary_lines(load_result()["summary"], options("--slo", "ttft=1s", "--goodput", "0.9"), "count")
    )

    assert "21 of 21 requests ended in 2.9 s, 1 failed" in text
    assert "check: count: tokens only counted" in text
    assert "1 x HTTP 503" in text
    assert "good (ttft ≤ 1 s): 10 requests, share 0.476 of at least 0.9 wanted" in text
    assert "warning" not in text


def test_late_starts_give_a_warning() -> None:
    summary = load_result()["summary"]
    summary["late_start_ms"]["p99"] = 250.0

    assert summary_lines(summary, options(), "simulated")[-1].startswith(
        "warning: 1 % of the requests started 250 ms late"
    )
