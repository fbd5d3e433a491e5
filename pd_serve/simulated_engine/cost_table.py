"""A cost model from measured steps in a CSV file: `phase,batch_size,new_tokens,context_tokens,ms`.

A row of phase `prefill` is a step over `batch_size` equal prompts of `new_tokens` each, none of it cached;
a row of phase `decode` is a step of one token each for `batch_size` requests, which have `context_tokens`
of context together; a row of phase `mixed` is such a step with a prompt of `new_tokens` beside.

Lines before the columns have the engine's sizes: `# num_blocks: 780`. See `SIZES`.
"""

import csv
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine.cost_model import LinearCostModel

COLUMNS = ("phase", "batch_size", "new_tokens", "context_tokens", "ms")

#: Sizes of an engine, as in `EngineSettings`, and of what is around it, as in `Hardware`.
ENGINE_SIZES = ("num_blocks", "block_tokens", "max_num_seqs", "chunk_tokens", "kv_bytes_per_token")
SIZES = (*ENGINE_SIZES, "kv_bytes_per_s", "kv_latency_s", "start_s", "num_gpus")


def read(path: Path) -> LinearCostModel:
    """Fits to all rows at once, least squares of the relative error, no coefficient below 0.

    Raises:
        InvalidRequestError: The file has other columns, or too few rows.
    """
    reader = csv.DictReader(line for line in _lines(path) if not line.startswith("#"))
    if not set(COLUMNS) <= set(reader.fieldnames or ()):
        raise InvalidRequestError(f"{path.name} must have the columns {','.join(COLUMNS)}")
    prefill, decode, mixed = [], [], []
    try:
        for row in reader:
            batch, new, context = (int(row[name]) for name in COLUMNS[1:4])
            if not float(row["ms"]) > 0:
                raise ValueError(f"a step of {row['ms']} ms")
            if row["phase"] == "prefill":
                prefill.append((float(row["ms"]), 1.0, batch * new, batch * new * new))
            elif row["phase"] == "decode":
                decode.append((float(row["ms"]), 1.0, batch, context))
            elif row["phase"] == "mixed":
                mixed.append((float(row["ms"]), new, batch, context))
            else:
                raise ValueError(f"phase {row['phase']!r}")
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"{path.name}: a row cannot be read: {error}") from error
    if min(len(prefill), len(decode)) < 3:
        raise InvalidRequestError(f"{path.name}: at least 3 rows of each phase are needed for a fit")
    model = LinearCostModel(_fit(prefill), _fit(decode))
    if not mixed:
        return model
    without = replace(model, mixed_ms=0.0)
    constants = [ms - without.mixed_s([(new, 0)], batch, context) * 1e3 for ms, new, batch, context in mixed]
    return replace(model, mixed_ms=max(statistics.median(constants), 0.0))


def read_sizes(path: Path) -> dict[str, float]:
    """The sizes that the file names; one that it does not name is missing.

    Raises:
        InvalidRequestError: One is unknown or no number above 0.
    """
    found = {}
    for line in _lines(path):
        name, colon, value = line.removeprefix("#").partition(":")
        if not line.startswith("#") or not colon:
            continue
        try:
            found[name.strip()] = float(value)
        except ValueError:
            found[name.strip()] = 0.0
        if name.strip() not in SIZES or not 0 < found[name.strip()] < float("inf"):
            raise InvalidRequestError(
                f"{path.name}: {line!r}: must be one of {', '.join(SIZES)}, and a number above 0"
            )
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path.name}: cannot be read: {error}") from error


def _fit(rows: Sequence[tuple[float, float, float, float]]) -> tuple[float, float, float]:
    table = np.array(rows)
    weighted = table[:, 1:] / table[:, :1]
    kept = [0, 1, 2]
    while True:
        found = np.linalg.lstsq(weighted[:, kept], np.ones(len(table)), rcond=None)[0]
        if found.min() >= 0 or len(kept) == 1:
            break
        kept.pop(int(found.argmin()))  # a cost that falls with size is noise
    coefficients = [0.0, 0.0, 0.0]
    for place, value in zip(kept, found.tolist(), strict=True):
        coefficients[place] = max(value, 0.0)
    return (coefficients[0], coefficients[1], coefficients[2])
