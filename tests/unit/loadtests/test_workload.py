"""Planned requests and their start times."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.workload import SHAPES, fitting, plan, warped
from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.workloads import TraceSpec

SPEC = TraceSpec("s-s", rate=10.0, requests=2000)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_keeps_number_order_and_duration(shape: str) -> None:
    steady = plan(SPEC, api="chat")
    shaped = plan(SPEC, api="chat", shape=shape)
    times = [request.at_s for request in shaped]
    assert len(shaped) == 2000
    assert times == sorted(times)
    assert times[0] == 0.0
    assert times[-1] == pytest.approx(steady[-1].at_s)
    assert [r.prompt_tokens for r in shaped] == [r.prompt_tokens for r in steady]


@pytest.mark.parametrize(
    ("shape", "shares"),
    [
        ("steady", [0.2, 0.2, 0.2, 0.2, 0.2]),
        ("ramp", [0.072, 0.136, 0.2, 0.264, 0.328]),
        ("spike", [1 / 7, 1 / 7, 3 / 7, 1 / 7, 1 / 7]),
        ("day", [0.079, 0.246, 0.350, 0.246, 0.079]),
    ],
)
def test_a_shape_sets_the_share_of_arrivals_in_each_fifth_of_the_time(
    shape: str, shares: list[float]
) -> None:
    times = warped(np.linspace(0, 100, 100_001), shape)
    counts, _ = np.histogram(times, bins=5, range=(0, 100))
    assert counts / len(times) == pytest.approx(shares, abs=0.002)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from(list(SHAPES)))
def test_no_shape_changes_the_order(times: list[float], shape: str) -> None:
    at = warped(np.sort(np.array(times)), shape)
    assert np.all(np.diff(at) >= 0)
    assert at[0] >= 0
    assert at[-1] == pytest.approx(max(times))


def test_the_rate_scale_makes_a_trace_faster() -> None:
    once, twice = plan(SPEC, api="chat"), plan(SPEC, api="chat", rate_scale=2)
    assert [r.at_s / 2 for r in once] == pytest.approx([r.at_s for r in twice])


def test_lengths_are_cut_and_priorities_kept() -> None:
    spec = TraceSpec("l-l", rate=10.0, requests=500, priority_fraction=0.2)
    cut = plan(spec, api="both", max_tokens=50, max_prompt_tokens=70, until_s=20)
    assert 100 < len(cut) < 300
    assert [request.number for request in cut] == list(range(len(cut)))
    assert max(r.at_s for r in cut) < 20
    assert (max(r.output_tokens for r in cut), max(r.prompt_tokens for r in cut)) == (50, 70)
    assert {r.api for r in cut} == {"chat", "completions"}
    assert {r.priority for r in cut} == {0, -1}
    assert len(fitting(cut, 119)) < len(cut)
    assert fitting(cut, 120) == cut


def test_the_same_seed_gives_the_same_plan() -> None:
    other = TraceSpec("s-s", rate=10.0, requests=2000, seed=1)
    assert plan(SPEC, api="both") == plan(SPEC, api="both")
    assert plan(SPEC, api="both") != plan(other, api="both")


def test_a_trace_file_keeps_its_arrivals_and_shared_prefixes(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    row = '{{"timestamp": {}, "input_length": {}, "output_length": 3, "hash_ids": {}}}\n'
    file.write_text(row.format(1000, 600, [7, 8]) + row.format(5000, 700, [7, 9]))
    first, second = plan(TraceSpec(str(file)), api="chat")
    assert (first.at_s, second.at_s) == (0.0, 4.0)
    assert (first.segments, second.segments) == ((7, 8), (7, 9))


def test_a_plan_without_requests_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="no requests in the first 0 s"):
        plan(SPEC, api="chat", until_s=0)
