"""Generated prompt and output lengths of the workloads of the Llumnix paper.

The distributions that the paper calls Short, Medium and Long are generated exactly as in its artifact.
For ShareGPT and BurstGPT the paper has only four quantiles and the mean: lengths are drawn from a curve
through the quantiles, prompts and outputs independently of each other.

Source: Llumnix (OSDI 2024), table 1; its artifact's trace generator.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Lengths = NDArray[np.int64]

#: Seed of the paper's artifact: reproduces the lengths of the paper.
PAPER_SEED = 0xCADE

#: Longest prompt and longest output in the paper.
LONGEST_TOKENS = 6144


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """Ranks r in 1..2*mean-1 with probability proportional to r^-alpha, scaled to the mean."""

    mean: int
    alpha: float

    def draw(self, count: int, dice: np.random.RandomState) -> Lengths:
        ranks = np.arange(1, 2 * self.mean)
        weights = ranks.astype(float) ** -self.alpha
        drawn = dice.choice(ranks, size=count, p=weights / weights.sum())
        stretched = np.ceil(drawn * (self.mean / drawn.mean())).astype(np.int64)
        lengths: Lengths = np.minimum(stretched, LONGEST_TOKENS)
        return lengths


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A curve from 1 through P50, P80, P95 and P99 to `longest`.

    Lengths grow geometrically between two quantiles. Below the median an exponent bends the curve such that
    its mean is `mean`.
    """

    mean: float
    p50: int
    p80: int
    p95: int
    p99: int
    longest: int

    def draw(self, count: int, dice: np.random.RandomState) -> Lengths:
        bend = self._bend()
        drawn = np.rint(self._curve(dice.random_sample(count), bend)).astype(np.int64)
        lengths: Lengths = np.maximum(drawn, 1)
        return lengths

    def _curve(self, u: NDArray[np.float64], bend: float) -> NDArray[np.float64]:
        at = np.array([0.0, 0.5, 0.8, 0.95, 0.99, 1.0])
        logs = np.log([1, self.p50, self.p80, self.p95, self.p99, self.longest])
        piece = np.clip(np.searchsorted(at, u, side="right") - 1, 0, len(at) - 2)
        along = (u - at[piece]) / np.diff(at)[piece]
        along = np.where(piece == 0, along**bend, along)
        curve: NDArray[np.float64] = np.exp(logs[piece] + along * np.diff(logs)[piece])
        return curve

    def _bend(self) -> float:
        u = (np.arange(20_000) + 0.5) / 20_000
        low, high = 0.02, 50.0  # a larger exponent gives more short lengths
        for _ in range(30):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self._curve(u, middle).mean() > self.mean else (low, middle)
        return low


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same length for all."""

    length: int

    def draw(self, count: int, dice: np.random.RandomState) -> Lengths:
        return np.full(count, self.length, dtype=np.int64)


Distribution = PowerLaw | Quantiles | Fixed

SHORT, MEDIUM, LONG = PowerLaw(128, 2.0), PowerLaw(256, 1.5), PowerLaw(512, 1.15)

#: Distributions of prompt and output lengths, by name of the trace.
GENERATED: dict[str, tuple[Distribution, Distribution]] = {
    "s-s": (SHORT, SHORT),
    "m-m": (MEDIUM, MEDIUM),
    "l-l": (LONG, LONG),
    "s-l": (SHORT, LONG),
    "l-s": (LONG, SHORT),
    "sharegpt-paper": (
        Quantiles(306, 74, 348, 1484, 3388, 4096),
        Quantiles(500, 487, 781, 988, 1234, 2048),
    ),
    "burstgpt": (
        Quantiles(830, 582, 1427, 2345, 3549, LONGEST_TOKENS),
        Quantiles(271, 243, 434, 669, 964, 2048),
    ),
}


def is_generated(name: str) -> bool:
    """Whether `generate` knows a trace: one of `GENERATED`, or PROMPT:OUTPUT for fixed lengths in tokens."""
    return name.lower() in GENERATED or re.fullmatch(r"[1-9]\d*:[1-9]\d*", name) is not None


def generate(name: str, count: int, seed: int = 0) -> tuple[Lengths, Lengths]:
    """Prompt and output lengths of a generated trace.

    Args:
        seed: 0 gives the lengths of the paper, whose artifact draws all prompts before all outputs.
    """
    dice = np.random.RandomState(PAPER_SEED + seed)
    if ":" in name:
        prompt, _, output = name.partition(":")
        return Fixed(int(prompt)).draw(count, dice), Fixed(int(output)).draw(count, dice)
    prompts, outputs = GENERATED[name]
    return prompts.draw(count, dice), outputs.draw(count, dice)
