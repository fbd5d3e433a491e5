"""Samples of the cluster as series, the report as one file that needs no other, and how a scenario ends."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loadtests import cluster_samples, report_page
from loadtests.cluster_samples import Period, Sample
from loadtests.load_options import Limit
from loadtests.outcome import Outcome, as_row, summarize
from loadtests.scenario import Scenario


def row(name: str, state: str = "ready", free: int = 75) -> dict[str, Any]:
    role = name.partition("-")[0]
    return {
        "id": name,
        "role": role,
        "state": state,
        "total_blocks": 0 if state == "starting" else 100,
        "free_blocks": free,
        "running": 2,
        "waiting": 1,
    }


def sample(at_s: float, rows: list[dict[str, Any]], moved: int = 0) -> Sample:
    reasons = {"handoff": {"committed": moved, "aborted": 1}, "manual": {"committed": 0, "aborted": 0}}
    decisions = (
        [{"seconds_ago": round(at_s - 0.6, 1), "what": "decode-1 is started: because"}] if at_s > 0.6 else []
    )
    cluster = {
        "instances": rows,
        "waiting_line": {"requests": 4, "tokens": 9},
        "migrations": reasons,
        "decisions": decisions,
    }
    return Sample(at_s, cluster)


SAMPLES = [
    sample(0.0, [row("decode-0")]),
    sample(1.0, [row("decode-0", free=50), row("decode-1", "starting")], 3),
    sample(2.0, [row("decode-0", "draining"), row("decode-1", "starting")], 7),
    sample(3.1, [row("decode-1")], 8),
]


def test_periods() -> None:
    assert cluster_samples.periods(SAMPLES) == [
        Period("decode-0", "decode", "ready", 0.0, 2.0),
        Period("decode-0", "decode", "draining", 2.0, 3.1),
        Period("decode-1", "decode", "starting", 1.0, 3.1),
        Period("decode-1", "decode", "ready", 3.1, 3.1),
    ]


def test_series() -> None:
    assert cluster_samples.names(SAMPLES) == ["decode-0", "decode-1"]
    assert cluster_samples.used_share(SAMPLES, "decode-0") == ([0.0, 1.0, 2.0], [0.25, 0.5, 0.25])
    assert cluster_samples.used_share(SAMPLES, "decode-1") == ([3.1], [0.25])
    assert cluster_samples.totals(SAMPLES, "running") == [2, 4, 4, 2]
    assert cluster_samples.totals(SAMPLES, "waiting") == [5, 6, 6, 5]
    assert cluster_samples.migrations(SAMPLES, "committed") == {"handoff": [0, 3, 7, 8], "manual": [0] * 4}
    assert cluster_samples.line(SAMPLES[2]).endswith("decode-0 draining, decode-1 starting")


def test_a_decision_is_told_once() -> None:
    ((at_s, what),) = cluster_samples.decisions(SAMPLES)
    assert (at_s, what) == (pytest.approx(0.6, abs=0.1), "decode-1 is started: because")


def result() -> dict[str, Any]:
    outcomes = [
        Outcome(n, "chat", 0, n * 0.1, 0.0, 9, 20, 0.1 * (n + 1), 0.02, 0.03, 1.0, [0.02] * 19)
        for n in range(20)
    ]
    outcomes.append(Outcome(20, "chat", 0, 2.0, 0.0, 9, 0, None, None, None, 0.1, [], "HTTP 503", "full"))
    return {
        "at": "today",
        "commit": None,
        "machine": {"cores": 2, "cpu": "<fast>"},
        "check": "simulated",
        "summary": summarize(outcomes, [Limit("ttft", 1.0)], 21),
        "requests": [as_row(one) for one in outcomes],
    }


class Resources(HTMLParser):
    """All that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    events = [(1.5, "decode-0 is drained")]
    report_page.write(tmp_path, result(), SAMPLES, events, ["1 requests: HTTP 503"], ["pd-serve <x>"])
    html = (tmp_path / "report.html").read_text()
    resources = Resources()
    resources.feed(html)
    assert len(resources.found) == 5
    assert all(source.startswith("data:image/svg+xml;base64,") for source in resources.found)
    assert not re.search(r"url\(|@import|<script", html)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    for shown in (
        "1 requests: HTTP 503",
        "decode-0 is drained",
        "decode-1 is started",
        "pd-serve &lt;x&gt;",
        "&lt;fast&gt;",
    ):
        assert shown in html
    assert "every one right" not in html


def test_a_good_run_says_so() -> None:
    html = report_page.page(result(), {}, SAMPLES, [], [], [])
    assert "every one right (simulated)" in html
    assert "95.2 %" not in html
    assert "Good (ttft ≤ 1 s): 47.6 %" in html


@pytest.mark.parametrize(
    ("drained", "problems", "failed", "says"),
    [
        (True, [], 0, []),
        (True, ["integrity: a slot is not given back"], 0, ["integrity: a slot is not given back"]),
        (True, [], 2, ["2 requests: a token is lost"]),
        (False, [], 0, ["nothing was drained: never two decode instances"]),
    ],
)
def test_how_a_scenario_ends(
    drained: bool,
    problems: list[str],
    failed: int,
    says: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = result() | {"began_at": 50.0}
    load["summary"]["failures"] = {"a token is lost": failed} if failed else {}
    (tmp_path / "report.json").write_text(json.dumps(load))
    scenario = Scenario("disaggregated", tmp_path, 10.0, 2.0, problems=problems)
    scenario.events = [(55.0, "decode-0 is drained")] if drained else []
    scenario.seen = [(50.0 + sample.at_s, sample.cluster) for sample in SAMPLES]
    assert scenario.conclude(["pd-serve", "locust"]) == (1 if says else 0)
    shown = capsys.readouterr().out
    for problem in says:
        assert f"FAILED: {problem}" in shown
        assert problem in (tmp_path / "report.html").read_text()
    assert len(json.loads((tmp_path / "samples.json").read_text())["samples"]) == 4


def test_a_scenario_without_load(tmp_path: Path) -> None:
    assert Scenario("neutral", tmp_path, 10.0, 2.0).conclude([]) == 1
