"""The points that `pd-serve bench profile` measures, and the table that the measured steps become."""

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pd_serve.simulated_engine.cost_model import CostModel
from pd_serve.simulated_engine.cost_table import COLUMNS

Phase = Literal["prefill", "decode", "mixed"]
PHASES: tuple[Phase, ...] = get_args(Phase)

#: Phases without which there is no fit; an engine may have no room for mixed steps.
FITTED: tuple[Phase, ...] = ("prefill", "decode")

PROMPTS = (16, 32, 64, 128, 256, 512, 1024, 2048)
PROMPT_BATCHES = ((2, 64), (4, 64), (2, 256), (4, 256), (8, 128), (4, 512))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (32, 256, 1024)
MIXED_BATCHES = (1, 4, 16, 64)
MIXED_PROMPTS = (64, 256, 1024)

#: Context of each decoding request beside a prompt, at the start.
MIXED_CONTEXT = 32

#: Context tokens of a batch together: filling the cache is not measured, and costs time.
MAX_CONTEXT_TOKENS = 8192

#: Steps of a decoding batch; the first ones are not counted, nor the last, in which the requests end.
DECODE_STEPS = 24
WARM_UP_STEPS = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of an engine.

    Attributes:
        step_tokens: Tokens of one step (`max_num_batched_tokens`).
        batch_size: Requests of one step (`max_num_seqs`).
        model_tokens: Tokens of one request.
        cache_tokens: Tokens of KV cache.
    """

    step_tokens: int
    batch_size: int
    model_tokens: int
    cache_tokens: int


@dataclass(frozen=True, slots=True)
class Point:
    """A kind of step: `batch_size` prompts of `tokens` each, or one token each for `batch_size` requests with
    `tokens` of context each at the start, or one prompt of `tokens` beside `batch_size` decoding requests."""

    phase: Phase
    batch_size: int
    tokens: int


@dataclass(frozen=True, slots=True)
class StepSeen:
    """A step of a real engine, as the cost models take it.

    Attributes:
        chunks: (new tokens, tokens already in the cache) per prompt.
        context_tokens: Context of the `decodes` requests together, before the step.
        ms: From the start of the step to that of the next one.
    """

    chunks: tuple[tuple[int, int], ...]
    decodes: int
    context_tokens: int
    ms: float


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the CSV file; see `pd_serve.simulated_engine.cost_table`."""

    phase: Phase
    batch_size: int
    new_tokens: int
    context_tokens: int
    ms: float

    def model_ms(self, model: CostModel) -> float:
        """Its time according to a cost model."""
        if self.phase == "prefill":
            return model.prefill_s([(self.new_tokens, 0)] * self.batch_size) * 1e3
        if self.phase == "mixed":
            return model.mixed_s([(self.new_tokens, 0)], self.batch_size, self.context_tokens) * 1e3
        return model.decode_s(self.batch_size, self.context_tokens) * 1e3


def points(limits: Limits) -> list[Point]:
    """All points within the limits of an engine, the shortest first."""
    prompts = [(1, tokens) for tokens in PROMPTS]
    found = [
        Point("prefill", batch, tokens)
        for batch, tokens in [*prompts, *PROMPT_BATCHES]
        if batch * tokens <= min(limits.step_tokens, limits.cache_tokens)
        and batch <= limits.batch_size
        and tokens + 2 <= limits.model_tokens
    ]
    most = min(MAX_CONTEXT_TOKENS, limits.cache_tokens // 2)
    found += [
        Point("decode", batch, tokens)
        for batch in BATCHES
        for tokens in CONTEXTS
        if batch <= limits.batch_size
        and batch * tokens <= most
        and tokens + DECODE_STEPS <= limits.model_tokens
    ]
    found += [
        Point("mixed", batch, tokens)
        for batch in MIXED_BATCHES
        for tokens in MIXED_PROMPTS
        if batch + 1 <= limits.batch_size
        and batch + tokens <= limits.step_tokens
        and batch * max(MIXED_CONTEXT + DECODE_STEPS, tokens) + tokens <= limits.cache_tokens
        and max(tokens, MIXED_CONTEXT + DECODE_STEPS) + 1 <= limits.model_tokens
    ]
    return sorted(found, key=lambda point: (point.batch_size * point.tokens, point.phase))


def samples(point: Point, steps: Sequence[StepSeen]) -> list[StepSeen]:
    """The steps of this kind, without those that fill the cache before, or in which requests end."""
    if point.phase == "prefill":
        chunks = ((point.tokens, 0),) * point.batch_size
        return [step for step in steps if step.chunks == chunks and not step.decodes]
    if point.phase == "mixed":
        beside = ((point.tokens, 0),)
        return [step for step in steps if step.chunks == beside and step.decodes == point.batch_size]
    pure = [step for step in steps if not step.chunks and step.decodes == point.batch_size]
    return pure[WARM_UP_STEPS:-1]


def rows(measured: Mapping[Point, Sequence[StepSeen]]) -> list[Row]:
    """Medians of all points that have a sample."""
    return [
        Row(
            point.phase,
            point.batch_size,
            1 if point.phase == "decode" else point.tokens,
            round(statistics.median(step.context_tokens for step in steps)),
            round(statistics.median(step.ms for step in steps), 4),
        )
        for point, steps in sorted(
            measured.items(),
            key=lambda item: (PHASES.index(item[0].phase), item[0].batch_size, item[0].tokens),
        )
        if steps
    ]


def write_csv(path: Path, table: Iterable[Row], sizes: Mapping[str, float] | None = None) -> None:
    """Writes a table for `cost_table.read`, below the sizes of the engine; see `cost_table.SIZES`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(f"# {name}: {value:g}\n" for name, value in (sizes or {}).items())
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(row, name) for name in COLUMNS] for row in table)


def relative_errors(table: Iterable[Row], model: CostModel) -> dict[str, dict[str, float]]:
    """{phase: {"median", "max"}} of |fitted / measured − 1|."""
    errors: dict[Phase, list[float]] = {phase: [] for phase in PHASES}
    for row in table:
        errors[row.phase].append(abs(row.model_ms(model) / row.ms - 1))
    return {
        phase: {"median": round(statistics.median(found), 4), "max": round(max(found), 4)}
        for phase, found in errors.items()
        if found
    }
