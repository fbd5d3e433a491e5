"""The load of `pd-serve bench simulator`, and what its clients see, real or simulated."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pd_serve.simulated_engine.cost_model import CostModel
from pd_serve.simulation.arrivals import Arrivals, drawn
from pd_serve.simulation.config import TraceRequest

PROMPT_TOKENS = (16, 256)
OUTPUT_TOKENS = (16, 96)

#: Requests in the batch at a time that the machine is loaded with, if nothing else is asked for.
CONCURRENCY = 2


@dataclass(slots=True)
class Latencies:
    """What clients saw, in seconds, over all their requests; gaps are those between two tokens."""

    request_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)

    def add(self, other: "Latencies") -> None:
        self.request_s += other.request_s
        self.ttft_s += other.ttft_s
        self.itl_s += other.itl_s


FIGURES = {"request": "request_s", "ttft": "ttft_s", "itl": "itl_s"}
PARTS = ("mean", "p50", "p99")


def make(num_requests: int, rate: float, seed: int) -> list[TraceRequest]:
    """Poisson arrivals, lengths uniform."""
    dice = random.Random(f"lengths {seed}")
    times = drawn(Arrivals("poisson"), rate, num_requests, np.random.RandomState(seed))
    return [
        TraceRequest(float(at), dice.randint(*PROMPT_TOKENS), dice.randint(*OUTPUT_TOKENS)) for at in times
    ]


def moderate_rate(model: CostModel) -> float:
    """Requests/s that keep about `CONCURRENCY` of them in the batch, to two digits."""
    prompt, output = sum(PROMPT_TOKENS) // 2, sum(OUTPUT_TOKENS) // 2
    context = CONCURRENCY * (prompt + output // 2)
    alone_s = model.prefill_s([(prompt, 0)]) + output * model.decode_s(CONCURRENCY, context)
    return float(f"{CONCURRENCY / alone_s:.2g}")


def summary(latencies: Latencies) -> dict[str, dict[str, float]]:
    """{"request", "ttft", "itl"} of {"mean", "p50", "p99"} in milliseconds."""
    return {name: _distribution(getattr(latencies, key)) for name, key in FIGURES.items()}


def ratios(real: dict[str, Any], simulated: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Real / simulated of two summaries."""
    return {
        name: {part: round(real[name][part] / simulated[name][part], 3) for part in PARTS} for name in FIGURES
    }


def _distribution(values: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(values, (50, 99))
    figures = (float(np.mean(values)), float(p50), float(p99))
    return {part: round(value * 1e3, 3) for part, value in zip(PARTS, figures, strict=True)}
