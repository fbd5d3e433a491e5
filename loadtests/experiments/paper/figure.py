"""What a figure is: which simulations it needs, and which points it makes of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import rich.console

from loadtests.experiments.paper.reference import Reference
from loadtests.experiments.runs import Results
from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.config import FITTED_FRONT_END_S
from pd_serve.simulation.scenario import Scenario
from pd_serve.simulation.workloads import TraceSpec

T = TypeVar("T")

#: The paper's names of what we call by the names of our policy sets.
PAPER_NAMES = {"round-robin": "Round-Robin", "infaas++": "INFaaS++", "llumnix-paper": "Llumnix"}
BASELINE, LLUMNIX, OURS = "INFaaS++", "Llumnix", "our defaults"


def paper_case(trace: TraceSpec, policy: str, **changes: Any) -> Scenario:
    """A run as in the paper: one migration at a time, and its front end."""
    return Scenario(trace, policy, max_migrations=1, front_end_s=FITTED_FRONT_END_S, **changes)


@dataclass(frozen=True, slots=True)
class Metric:
    """Attributes:
    name: As the paper calls it; also its key in the reference.
    path: Where a summary has it.
    log: Shown on a logarithmic axis.
    """

    name: str
    path: tuple[str, ...] = ()
    unit: str = "s"
    log: bool = False

    def of(self, summary: dict[str, Any]) -> float | None:
        value: Any = summary
        for key in self.path:
            value = value[key]
        return None if value is None else float(value)


LATENCIES = (
    Metric("Request P99", ("request_s", "p99")),
    Metric("Request Mean", ("request_s", "mean")),
    Metric("Prefill P99", ("prefill_s", "p99"), log=True),
    Metric("Prefill Mean", ("prefill_s", "mean"), log=True),
    Metric("Decode P99", ("decode_s", "p99")),
    Metric("Decode Mean", ("decode_s", "mean")),
)


@dataclass(frozen=True, slots=True)
class Point:
    """One number of ours, of the paper, or of both at the same place."""

    panel: str
    series: str
    metric: str
    x: float
    ours: float | None = None
    paper: float | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """Attributes:
    requests: Per run.
    rates: Which points of each curve to run: "all", or some of "first", "last".
    """

    requests: int
    rates: frozenset[str]
    seed: int
    reference: Reference

    @classmethod
    def of(cls, requests: int, rates: str, seed: int, reference: Path | None) -> "Options":
        """Raises:
        InvalidRequestError: Unknown rates, or a reference that cannot be read.
        """
        chosen = frozenset(rates.split(","))
        if not chosen <= {"all", "first", "last"}:
            raise InvalidRequestError(f"--rates {rates}: must be all, first, last or first,last")
        return cls(requests, chosen, seed, Reference.read(reference))

    def pick(self, points: Sequence[T]) -> list[T]:
        """Those of a curve's points that are wanted."""
        if "all" in self.rates:
            return list(points)
        ends = {"first": points[0], "last": points[-1]}
        return [point for name, point in ends.items() if name in self.rates]


@dataclass(frozen=True, slots=True)
class Figure:
    """Attributes:
    number: In the paper; None if it is not there.
    cases: The simulations that it needs.
    points: What it shows, from their results; also where it measures something itself.
    findings: What the paper says of it in words, in our numbers, one line each.
    time_series: Points are joined in the order of x without marks.
    """

    number: int | None
    name: str
    title: str
    x_label: str
    metrics: tuple[Metric, ...]
    cases: Callable[[Options], list[Scenario]]
    points: Callable[[Options, Results, rich.console.Console], list[Point]]
    findings: Callable[[Sequence[Point]], list[str]] = lambda points: []
    log_x: bool = False
    time_series: bool = False

    @property
    def file_name(self) -> str:
        return f"figure{self.number}-{self.name}" if self.number else self.name

    @property
    def heading(self) -> str:
        return f"Figure {self.number}: {self.title}" if self.number else self.title
