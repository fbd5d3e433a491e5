"""Reading request traces: Azure's CSV, Mooncake's JSON lines, lengths only as CSV.

The files are not part of this project. They are looked for in a folder that is given, or named by the
environment variable PD_SERVE_TRACES, or is `../shared/traces` beside the project.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.arrivals import Seconds
from pd_serve.simulation.lengths import Lengths

ENVIRONMENT_VARIABLE = "PD_SERVE_TRACES"

#: By name of the trace.
FILES = {
    "azure-conv": "AzureLLMInferenceTrace_conv.csv",  # Azure Public Dataset, 2023; CC-BY 4.0
    "azure-code": "AzureLLMInferenceTrace_code.csv",
    "mooncake": "mooncake_synthetic_trace.jsonl",  # Mooncake, FAST 2025; Apache-2.0
    "sharegpt": "sharegpt_first_turn.csv",  # lengths of ShareGPT-GPT4, from sarathi-serve; Apache-2.0
}

#: Columns of a CSV file that hold prompt and output lengths.
COLUMNS = (("ContextTokens", "GeneratedTokens"), ("input_tokens", "output_tokens"))
TIME_COLUMN = "TIMESTAMP"


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a file holds, one entry per request.

    Attributes:
        arrivals: In seconds; None if the file has lengths only.
        segments: See `TraceRequest.segments`; None if the file says nothing of shared contents.
    """

    prompts: Lengths
    outputs: Lengths
    arrivals: Seconds | None = None
    segments: list[tuple[int, ...]] | None = None


def find(name: str, folder: Path | None = None) -> Path:
    """The file of a named trace, or the file of that path.

    Raises:
        InvalidRequestError: There is none; the message says what to do.
    """
    if name not in FILES:
        path = Path(name)
        if path.is_file():
            return path
        raise InvalidRequestError(f"trace {name!r}: neither a known trace nor a file; known: {_known()}")
    folders = [folder] if folder is not None else _folders()
    for candidate in folders:
        if (candidate / FILES[name]).is_file():
            return candidate / FILES[name]
    looked = " or ".join(str(candidate) for candidate in folders) or "no folder"
    raise InvalidRequestError(
        f"trace {name!r} needs the file {FILES[name]}, which is not in {looked}: give its folder with "
        f"--traces or ${ENVIRONMENT_VARIABLE}, or use a trace that needs no file ({', '.join(_generated())})"
    )


def read(path: Path) -> Recorded:
    """Reads a trace.

    Raises:
        InvalidRequestError: The file is not of a known shape.
    """
    try:
        with path.open(encoding="utf-8") as file:
            recorded = _read_jsonl(file) if path.suffix == ".jsonl" else _read_csv(file)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InvalidRequestError(f"{path.name} is not a trace that can be read: {error}") from error
    if not len(recorded.prompts):
        raise InvalidRequestError(f"{path.name} holds no requests")
    return recorded


def _read_jsonl(lines: Iterator[str]) -> Recorded:
    rows = [json.loads(line) for line in lines if line.strip()]
    return Recorded(
        _positive(row["input_length"] for row in rows),
        _positive(row["output_length"] for row in rows),
        np.array([row["timestamp"] for row in rows], dtype=float) * 1e-3,
        [tuple(row["hash_ids"]) for row in rows] if rows and "hash_ids" in rows[0] else None,
    )


def _read_csv(lines: Iterator[str]) -> Recorded:
    header = next(lines, "").strip().split(",")
    pair = next((pair for pair in COLUMNS if set(pair) <= set(header)), None)
    if pair is None:
        raise ValueError(f"its first line must name the columns {' or '.join(map(','.join, COLUMNS))}")
    rows = [line.strip().split(",") for line in lines if line.strip()]
    prompt, output = (header.index(name) for name in pair)
    arrivals = None
    if TIME_COLUMN in header:
        column = header.index(TIME_COLUMN)
        stamps = np.array([row[column] for row in rows], dtype="datetime64[ns]")
        arrivals = (stamps - stamps[:1]).astype(np.int64) * 1e-9
    return Recorded(
        _positive(int(row[prompt]) for row in rows), _positive(int(row[output]) for row in rows), arrivals
    )


def _positive(values: Iterator[int]) -> NDArray[np.int64]:
    """Every request has a prompt and an answer of at least one token."""
    return np.maximum(np.array(list(values), dtype=np.int64), 1)


def _folders() -> list[Path]:
    configured = os.environ.get(ENVIRONMENT_VARIABLE)
    if configured:
        return [Path(configured)]
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "traces"
    return [beside] if beside.is_dir() else []


def _generated() -> list[str]:
    from pd_serve.simulation.lengths import GENERATED

    return list(GENERATED)


def _known() -> str:
    return ", ".join([*_generated(), *FILES])
