"""A cost model from measured steps in a CSV file: `phase,batch_size,new_tokens,context_tokens,ms`.

A row of phase `prefill` is a step over `batch_size` equal prompts of `new_tokens` each, none of it cached;
a row of phase `decode` is a step of one token each for `batch_size` requests, which have `context_tokens`
of context together.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine.cost_model import COST_MODELS, CostModel, LinearCostModel

COLUMNS = ("phase", "batch_size", "new_tokens", "context_tokens", "ms")


def cost_model(name: str) -> CostModel:
    """The known cost model of that name, or one fitted to the CSV file of that path.

    Raises:
        InvalidRequestError: It is neither.
    """
    if name in COST_MODELS:
        return COST_MODELS[name]
    if not Path(name).is_file():
        known = ", ".join(COST_MODELS)
        raise InvalidRequestError(f"cost model {name!r}: neither known nor a file; known: {known}")
    return read(Path(name))


def read(path: Path) -> LinearCostModel:
    """Fits to all rows at once, least squares of the relative error, no coefficient below 0.

    Raises:
        InvalidRequestError: The file has other columns, or too few rows.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path.name}: cannot be read: {error}") from error
    reader = csv.DictReader(text.splitlines())
    if not set(COLUMNS) <= set(reader.fieldnames or ()):
        raise InvalidRequestError(f"{path.name} must have the columns {','.join(COLUMNS)}")
    prefill, decode = [], []
    try:
        for row in reader:
            batch, new, context = (int(row[name]) for name in COLUMNS[1:4])
            if not float(row["ms"]) > 0:
                raise ValueError(f"a step of {row['ms']} ms")
            if row["phase"] == "prefill":
                prefill.append((float(row["ms"]), 1.0, batch * new, batch * new * new))
            elif row["phase"] == "decode":
                decode.append((float(row["ms"]), 1.0, batch, context))
            else:
                raise ValueError(f"phase {row['phase']!r}")
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"{path.name}: a row cannot be read: {error}") from error
    if min(len(prefill), len(decode)) < 3:
        raise InvalidRequestError(f"{path.name}: at least 3 rows of each phase are needed for a fit")
    return LinearCostModel(_fit(prefill), _fit(decode))


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
