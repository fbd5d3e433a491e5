"""The HTML report."""

import re
from html.parser import HTMLParser
from pathlib import Path

from loadtests.report.page import LoadTestReport
from tests.unit.loadtests.report.made_report import SAMPLES, load_result


class Resources(HTMLParser):
    """Collects everything that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    events = [(1.5, "decode-0 is drained")]
    report = LoadTestReport(load_result(), SAMPLES, events, ["1 requests: HTTP 503"], ["pd-serve <x>"])
    report.write(tmp_path)
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
    assert "all correct" not in html


def test_the_page_of_a_good_run_says_so() -> None:
    html = LoadTestReport(load_result(), SAMPLES).html({})
    assert "all correct (check: simulated)" in html
    assert "95.2 %" not in html
    assert "Good (ttft ≤ 1 s): 47.6 %" in html
