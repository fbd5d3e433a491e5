"""Reads request traces: Azure's CSV, Mooncake's JSON lines, CSV files with lengths only.

The files are not part of this project. They are looked for in the given folder, in the folder of the
environment variable PD_SERVE_TRACES, or in the folder shared/traces next to the project's.
"""

import csv
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.arrivals import Seconds
from pd_serve.simulation.lengths import GENERATED, Lengths

ENVIRONMENT_VARIABLE = "PD_SERVE_TRACES"

#: Name of the file and its source, by name of the trace.
FILES = {
    "azure-conv": ("AzureLLMInferenceTrace_conv.csv", "github.com/Azure/AzurePublicDataset"),  # CC-BY 4.0
    "azure-code": ("AzureLLMInferenceTrace_code.csv", "github.com/Azure/AzurePublicDataset"),
    # FAST 2025; Apache-2.0
    "mooncake": ("mooncake_synthetic_trace.jsonl", "github.com/kvcache-ai/Mooncake, synthetic_trace.jsonl"),
    # lengths of ShareGPT-GPT4; Apache-2.0
    "sharegpt": ("sharegpt_first_turn.csv", "github.com/microsoft/sarathi-serve, data/processed_traces"),
}

#: Columns of a CSV file with the prompt and output lengths.
COLUMNS = (
    ("ContextTokens", "GeneratedTokens"),
    ("input_tokens", "output_tokens"),
    ("num_prefill_tokens", "num_decode_tokens"),
)
TIME_COLUMN = "TIMESTAMP"


@dataclass(frozen=True, slots=True)
class RecordedTrace:
    """Contents of a trace file, one entry per request.

    Attributes:
        arrivals: In seconds; None if the file has lengths only.
        segments: See `TraceRequest.segments`; None if the file has no information on shared contents.
    """

    prompts: Lengths
    outputs: Lengths
    arrivals: Seconds | None = None
    segments: list[tuple[int, ...]] | None = None


def find(name: str, folder: Path | None = None) -> Path:
    """The file of a named trace, or the file at that path.

    Raises:
        InvalidRequestError: There is no such file; the message has its source.
    """
    if name not in FILES:
        path = Path(name)
        if path.is_file():
            return path
        known = ", ".join([*GENERATED, *FILES])
        raise InvalidRequestError(f"trace {name!r}: neither a known trace nor a file; known: {known}")
    file, source = FILES[name]
    folders = [folder] if folder is not None else _folders()
    for candidate in folders:
        if (candidate / file).is_file():
            return candidate / file
    looked = f"not in {' or '.join(map(str, folders))}" if folders else "not part of pd-serve"
    raise InvalidRequestError(
        f"trace {name!r} needs the file {file}, which is {looked}: download it ({source}) and give its "
        f"folder with --traces or ${ENVIRONMENT_VARIABLE}, or use a trace that needs no file "
        f"({', '.join(GENERATED)})"
    )


def read(path: Path) -> RecordedTrace:
    """Reads a trace.

    Raises:
        InvalidRequestError: The format is unknown, or the file has no requests.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            trace = _read_jsonl(file) if path.suffix == ".jsonl" else _read_csv(file)
    except KeyError as error:
        raise InvalidRequestError(f"{path.name} is not a trace that can be read: no {error}") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequestError(f"{path.name} is not a trace that can be read: {error}") from error
    if not len(trace.prompts):
        raise InvalidRequestError(f"{path.name} has no requests")
    if trace.arrivals is not None and not np.isfinite(trace.arrivals).all():
        raise InvalidRequestError(
            f"{path.name} is not a trace that can be read: not every request has a time"
        )
    return trace


def _read_jsonl(lines: Iterable[str]) -> RecordedTrace:
    rows = [json.loads(line) for line in lines if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("each line must be an object with timestamp, input_length, output_length")
    return RecordedTrace(
        _positive(row["input_length"] for row in rows),
        _positive(row["output_length"] for row in rows),
        np.array([row["timestamp"] for row in rows], dtype=float) * 1e-3,
        [tuple(row["hash_ids"]) for row in rows] if rows and "hash_ids" in rows[0] else None,
    )


def _read_csv(lines: Iterable[str]) -> RecordedTrace:
    table = csv.DictReader(lines)
    header = table.fieldnames or ()
    pair = next((pair for pair in COLUMNS if set(pair) <= set(header)), None)
    if pair is None:
        raise ValueError(f"its first line must name the columns {' or '.join(map(','.join, COLUMNS))}")
    rows = list(table)
    arrivals = None
    if TIME_COLUMN in header:
        arrivals = _seconds([row[TIME_COLUMN] for row in rows])
    prompts, outputs = (_positive(int(row[column]) for row in rows) for column in pair)
    return RecordedTrace(prompts, outputs, arrivals)


def _seconds(texts: list[str]) -> Seconds:
    """Times from numbers of seconds, or from dates, the first of which is 0. Raises: ValueError."""
    try:
        return np.array(texts, dtype=float)
    except ValueError:
        dates = [datetime.fromisoformat(text) for text in texts]
    # A date without a time zone is one of UTC.
    dates = [date if date.tzinfo else date.replace(tzinfo=UTC) for date in dates]
    return np.array([(date - dates[0]).total_seconds() for date in dates])


def _positive(values: Iterable[int]) -> Lengths:
    """Raises all lengths to at least one token. Raises: ValueError: one is below 0."""
    lengths = np.array(list(values), dtype=np.int64)
    if (lengths < 0).any():
        raise ValueError(f"a length of {lengths.min()} tokens")
    return np.maximum(lengths, 1)


def _folders() -> list[Path]:
    if configured := os.environ.get(ENVIRONMENT_VARIABLE):
        return [Path(configured)]
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "traces"
    return [beside] if beside.is_dir() else []
