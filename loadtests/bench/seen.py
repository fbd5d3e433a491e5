"""What clients of `pd-serve bench compare` ask for and see, and its statistics."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pd_serve.simulation.arrivals import Arrivals, drawn
from pd_serve.simulation.config import TraceRequest

#: Prompts of a chat, and now and then one with a document in it.
SHORT_PROMPT, LONG_PROMPT = (64, 512), (1024, 1792)
LONG_SHARE = 0.1
OUTPUT_TOKENS = (16, 224)


@dataclass(frozen=True, slots=True)
class Load:
    """One round's load.

    Attributes:
        rate: Requests/s of Poisson arrivals; None for a closed loop.
        num_clients: Of a closed loop, each sending its next request when its last has ended.
    """

    name: str
    num_requests: int
    rate: float | None = None
    num_clients: int = 0

    def requests(self, seed: int) -> list[TraceRequest]:
        """The same for the same seed."""
        dice = random.Random(f"{self.name} {seed}")
        times = np.zeros(self.num_requests)
        if self.rate is not None:
            times = drawn(Arrivals("poisson"), self.rate, self.num_requests, np.random.RandomState(seed))
        return [TraceRequest(float(at), *self.lengths(dice)) for at in times]

    def lengths(self, dice: random.Random) -> tuple[int, int]:
        """Tokens of a prompt and of its output."""
        prompt = LONG_PROMPT if dice.random() < LONG_SHARE else SHORT_PROMPT
        return dice.randint(*prompt), dice.randint(*OUTPUT_TOKENS)


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as its client saw it, in seconds.

    Attributes:
        gaps_s: Between messages that bring tokens.
        error: Why it counts as failed; empty if it does not.
    """

    ttft_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    num_tokens: int = 0
    error: str = ""

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return sum(self.gaps_s) / max(self.num_tokens - 1, 1)


@dataclass(slots=True)
class Round:
    """One arm under one round's load.

    Attributes:
        cpu_s: Of all processes of the arm.
        load_average: Of the machine at the start, over a minute.
    """

    seconds: float
    cpu_s: float
    load_average: float
    answers: list[Answer] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.answers)


def figures(rounds: Sequence[Round]) -> dict[str, float]:
    """Over all requests of all rounds; times in ms. Those that failed count as failures only."""
    answers = [answer for one in rounds for answer in one.answers]
    good = [answer for answer in answers if not answer.error]
    result: dict[str, float] = {"requests": len(answers), "failures": len(answers) - len(good)}
    result |= _percentiles("ttft", [answer.ttft_s for answer in good])
    result |= _percentiles("tpot", [answer.tpot_s for answer in good])
    result |= _percentiles("itl", [gap for answer in good for gap in answer.gaps_s])
    longest = [max(answer.gaps_s) for answer in good if answer.gaps_s]
    result |= _percentiles("longest_gap", longest)
    if longest:
        result["longest_gap_max_ms"] = round(max(longest) * 1e3, 2)
    num_tokens = sum(one.num_tokens for one in rounds)
    result["output_tokens_per_s"] = round(
        statistics.median(one.num_tokens / one.seconds for one in rounds), 1
    )
    if num_tokens:
        result["cpu_ms_per_token"] = round(sum(one.cpu_s for one in rounds) / num_tokens * 1e3, 3)
    return result


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    p50, p99 = np.percentile(seconds, (50, 99))
    return {f"{name}_p50_ms": round(float(p50) * 1e3, 2), f"{name}_p99_ms": round(float(p99) * 1e3, 2)}


#: Figures of which a ratio to another arm is told.
COMPARED = (
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tpot_p50_ms",
    "tpot_p99_ms",
    "itl_p99_ms",
    "output_tokens_per_s",
    "cpu_ms_per_token",
)


def ratios(arm: Sequence[Round], reference: Sequence[Round]) -> dict[str, float]:
    """Arm ÷ reference, the median over rounds that followed each other.

    None of what is 0 in the reference: gaps are, where messages come in bunches.
    """
    pairs = [(figures([a]), figures([b])) for a, b in zip(arm, reference, strict=True)]
    return {
        name: round(statistics.median(a[name] / b[name] for a, b in pairs), 3)
        for name in COMPARED
        if all(name in a and b.get(name) for a, b in pairs)
    }
