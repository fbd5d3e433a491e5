"""Trace files of every format become requests, or a clear error."""

import json
from pathlib import Path

import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.simulation import trace_files
from pd_serve.simulation.workloads import TraceSpec, make_requests

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,396,109
2023-11-16 18:15:51.1805900,879,55"""


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


@pytest.mark.parametrize(
    "stamps",
    [
        ("7", "8.5", "6"),
        ("2026-01-01 00:00:07", "2026-01-01 00:00:08.5", "2026-01-01 00:00:06"),
        ("2026-01-01T00:00:07Z", "2026-01-01T01:00:08.5+01:00", "2026-01-01 00:00:06"),
    ],
    ids=["seconds", "dates", "time zones"],
)
def test_times_are_seconds_or_dates_in_any_order(stamps: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    rows = [f"{stamp},{10 + number},5" for number, stamp in enumerate(stamps)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))

    requests = make_requests(TraceSpec(str(path)))

    assert [(r.arrival_s, r.prompt_tokens) for r in requests] == [(0, 12), (1, 10), (2.5, 11)]


def test_mooncake_file_has_the_segments_that_prompts_share(tmp_path: Path) -> None:
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


def test_a_missing_file_is_an_error_with_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trace_files.ENVIRONMENT_VARIABLE, str(tmp_path))

    with pytest.raises(
        InvalidRequestError,
        match=r"sharegpt_first_turn.csv.*download it \(github.com/.*--traces or \$PD_SERVE_TRACES",
    ):
        make_requests(TraceSpec("sharegpt", rate=1))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "x,y\n1,2\n"),
        ("a.csv", ""),
        ("a.csv", AZURE[:45]),
        ("a.csv", AZURE + "\n2023-11-16 18:15:52,-5,3"),
        ("a.csv", AZURE + "\n2023-11-16 18:15:52,1" + 30 * "0" + ",3"),
        ("a.csv", AZURE + "\n,10,3"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnan,10,3"),
        ("a.jsonl", "{}\n"),
        ("a.jsonl", "[1]\n"),
        ("a.jsonl", "no"),
        ("a.jsonl", '{"timestamp": Infinity, "input_length": 1, "output_length": 1}'),
    ],
)
def test_a_file_of_unknown_format_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)

    with pytest.raises(InvalidRequestError, match=name):
        make_requests(TraceSpec(str(tmp_path / name)))
