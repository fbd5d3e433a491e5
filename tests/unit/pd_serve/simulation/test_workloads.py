"""Workloads: arrivals, priorities, seeds, errors."""

import numpy as np
import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.lengths import GENERATED
from pd_serve.simulation.workloads import HIGH_PRIORITY, TraceSpec, fitting, make_requests


def rate_of(arrivals: list[float]) -> float:
    return (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])


@pytest.mark.parametrize("name", GENERATED)
def test_a_list_is_a_function_of_the_seed(name: str) -> None:
    spec = TraceSpec(name, rate=5, requests=50, arrivals="gamma:2", priority_fraction=0.2, seed=3)

    assert make_requests(spec) == make_requests(spec)
    assert make_requests(spec) != make_requests(TraceSpec(**{**_fields(spec), "seed": 4}))


def test_arrivals_and_priorities_leave_lengths_as_they_are() -> None:
    plain = make_requests(TraceSpec("m-m", rate=5, requests=50))
    other = make_requests(TraceSpec("m-m", rate=9, requests=50, arrivals="gamma:4", priority_fraction=0.5))

    assert [(r.prompt_tokens, r.output_tokens) for r in plain] == [
        (r.prompt_tokens, r.output_tokens) for r in other
    ]


@pytest.mark.parametrize(("arrivals", "cv"), [("poisson", 1.0), ("gamma:4", 4.0), ("gamma:0.5", 0.5)])
def test_drawn_arrivals_have_their_rate_and_variation(arrivals: str, cv: float) -> None:
    requests = make_requests(TraceSpec("s-s", rate=26, requests=100_000, arrivals=arrivals))
    times = [r.arrival_s for r in requests]
    gaps = np.diff(times)

    assert times[0] == 0
    assert rate_of(times) == pytest.approx(26, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_the_share_of_high_priority_is_exact_and_spread() -> None:
    requests = make_requests(TraceSpec("s-s", rate=26, requests=1000, priority_fraction=0.1))
    high = [i for i, r in enumerate(requests) if r.priority == HIGH_PRIORITY]

    assert len(high) == 100
    assert 400 < np.mean(high) < 600
    assert {r.priority for r in requests} == {0, HIGH_PRIORITY}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TraceSpec("s-s"), "a rate is needed"),
        (TraceSpec("s-s", rate=0), "rate 0"),
        (TraceSpec("s-s", rate=1, requests=0), "at least 1"),
        (TraceSpec("s-s", rate=1, priority_fraction=1.5), "priority fraction"),
        (TraceSpec("s-s", rate=1, seed=-1), "seed -1"),
        (TraceSpec("s-s", rate=1, arrivals="recorded"), "no recorded arrival times"),
        (TraceSpec("nothing"), "neither a known trace nor a file; known: s-s.*mooncake"),
    ],
)
def test_an_invalid_specification_is_refused_with_the_reason(spec: TraceSpec, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        make_requests(spec)


def test_requests_that_never_fit_can_be_left_out() -> None:
    requests = make_requests(TraceSpec("l-l", rate=1, requests=1000))

    kept = fitting(requests, 4096)

    assert 0 < len(kept) < 1000
    assert max(r.prompt_tokens + r.output_tokens for r in kept) <= 4096


def _fields(spec: TraceSpec) -> dict[str, object]:
    return {name: getattr(spec, name) for name in TraceSpec.__dataclass_fields__}
