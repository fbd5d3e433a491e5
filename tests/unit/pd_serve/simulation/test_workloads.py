"""Workloads: the paper's table, files of every shape, arrivals, priorities, seeds, errors."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.simulation import trace_files
from pd_serve.simulation.arrivals import Arrivals
from pd_serve.simulation.lengths import GENERATED, generate
from pd_serve.simulation.workloads import HIGH_PRIORITY, TraceSpec, fitting, make_requests

#: Llumnix (OSDI 2024), table 1: P50, P80, P95, P99 of the prompts.
PAPER_QUANTILES = {"s-s": (38, 113, 413, 1464), "m-m": (32, 173, 1288, 4208), "l-l": (55, 582, 3113, 5166)}

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,396,109
2023-11-16 18:15:51.1805900,879,55"""


def rate_of(arrivals: list[float]) -> float:
    return (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])


@pytest.mark.parametrize("name", PAPER_QUANTILES)
def test_the_papers_prompts_come_out_exactly(name: str) -> None:
    prompts, _ = generate(name, 10_000)

    assert tuple(int(np.percentile(prompts, q)) for q in (50, 80, 95, 99)) == PAPER_QUANTILES[name]


@pytest.mark.parametrize("name", ["sharegpt-paper", "burstgpt"])
def test_curves_through_quantiles_have_those_quantiles_and_that_mean(name: str) -> None:
    for distribution, drawn in zip(GENERATED[name], generate(name, 200_000), strict=True):
        wanted = (distribution.p50, distribution.p80, distribution.p95, distribution.p99)  # type: ignore[union-attr]
        assert np.percentile(drawn, (50, 80, 95, 99)) == pytest.approx(wanted, rel=0.03)
        assert drawn.mean() == pytest.approx(distribution.mean, rel=0.02)


def test_mixed_traces_take_prompts_of_one_and_outputs_of_the_other() -> None:
    prompts, outputs = generate("s-l", 10_000)

    assert prompts.tolist() == generate("s-s", 10_000)[0].tolist()
    assert outputs.mean() == pytest.approx(512, rel=0.01)


def test_ten_thousand_requests_take_little_time() -> None:
    begin = time.perf_counter()
    make_requests(TraceSpec("l-l", rate=2.6))

    assert time.perf_counter() - begin < 1


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


def test_azure_file_keeps_its_times_or_takes_a_rate(tmp_path: Path) -> None:
    (tmp_path / "AzureLLMInferenceTrace_conv.csv").write_text(AZURE)

    as_recorded = make_requests(TraceSpec("azure-conv"), tmp_path)
    faster = make_requests(TraceSpec("azure-conv", rate=2), tmp_path)

    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in as_recorded] == [
        (0, 374, 44),
        (4, 396, 109),
        (4.5, 879, 55),
    ]
    assert [r.arrival_s for r in faster] == pytest.approx([0, 4 * 1 / 4.5, 1])
    assert [r.arrival_s for r in make_requests(TraceSpec("azure-conv", requests=2), tmp_path)] == [0, 4]
    poisson = make_requests(TraceSpec("azure-conv", arrivals="poisson"), tmp_path)
    assert [r.prompt_tokens for r in poisson] == [374, 396, 879]
    with pytest.raises(InvalidRequestError, match="has 3 requests"):
        make_requests(TraceSpec("azure-conv", requests=4), tmp_path)


def test_mooncake_file_says_what_prompts_share(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 900, "output_length": 6, "hash_ids": [7, 8]},
        {"timestamp": 1500, "input_length": 700, "output_length": 0, "hash_ids": [7, 9]},
    ]
    path = tmp_path / "any.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")

    first, second = make_requests(TraceSpec(str(path)))

    assert (first.segments, second.segments) == ((7, 8), (7, 9))
    assert (second.arrival_s, second.output_tokens) == (1.5, 1)


@pytest.mark.parametrize(
    "header", ["input_tokens,output_tokens", "num_prefill_tokens,num_decode_tokens"], ids=["ours", "sarathi"]
)
def test_a_file_of_lengths_is_sampled(header: str, tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text(f"{header}\n" + "\n".join(f"{i},{i + 1000}" for i in range(1, 41)))

    few = make_requests(TraceSpec(str(path), rate=1, requests=40))
    many = make_requests(TraceSpec(str(path), rate=1, requests=100))

    assert {r.prompt_tokens for r in few} == set(range(1, 41))
    assert all(r.output_tokens == r.prompt_tokens + 1000 for r in many)
    assert len(many) == 100


@pytest.mark.parametrize("text", ["", "gamma", "gamma:0", "gamma:x", "gamma:nan", "poisson:2", "uniform"])
def test_unknown_arrivals(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="must be poisson, gamma:CV"):
        Arrivals.parse(text)


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
def test_what_cannot_be_is_said(spec: TraceSpec, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        make_requests(spec)


def test_a_missing_file_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trace_files.ENVIRONMENT_VARIABLE, str(tmp_path))

    with pytest.raises(
        InvalidRequestError,
        match=r"sharegpt_first_turn.csv.*download it \(github.com/.*--traces or \$PD_SERVE_TRACES",
    ):
        make_requests(TraceSpec("sharegpt", rate=1))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "x,y\n1,2\n"), ("a.csv", ""), ("a.jsonl", "{}\n"), ("a.jsonl", "no"), ("a.csv", AZURE[:45])],
)
def test_a_file_of_no_known_shape(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)

    with pytest.raises(InvalidRequestError, match=name):
        make_requests(TraceSpec(str(tmp_path / name), rate=1))


def test_what_never_fits_can_be_left_out() -> None:
    requests = make_requests(TraceSpec("l-l", rate=1, requests=1000))

    kept = fitting(requests, 4096)

    assert 0 < len(kept) < 1000
    assert max(r.prompt_tokens + r.output_tokens for r in kept) <= 4096


def _fields(spec: TraceSpec) -> dict[str, object]:
    return {name: getattr(spec, name) for name in TraceSpec.__dataclass_fields__}
