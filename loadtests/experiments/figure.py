"""A figure as data: the simulations that it needs, and the points that it shows of their results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import rich.console

from loadtests.experiments.paper_points import PaperPoints
from loadtests.experiments.result_store import Results
from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.scenario import Scenario

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a simulation's summary.

    Attributes:
        name: As in the paper and its points.
        path: Keys of the number in the summary.
        log: Plotted on a logarithmic axis.
    """

    name: str
    path: tuple[str, ...] = ()
    unit: str = "s"
    log: bool = False

    def of(self, summary: dict[str, Any]) -> float | None:
        """The number in a summary."""
        value: Any = summary
        for key in self.path:
            value = value[key]
        return None if value is None else float(value)


@dataclass(frozen=True, slots=True)
class FigurePoint:
    """One number of ours, of the paper, or of both at the same x."""

    panel: str
    series: str
    metric: str
    x: float
    ours: float | None = None
    paper: float | None = None


@dataclass(frozen=True, slots=True)
class PlottedScenario:
    """A simulation and its place in a figure."""

    panel: str
    series: str
    x: float
    scenario: Scenario


@dataclass(frozen=True, slots=True)
class FigureOptions:
    """What to simulate.

    Attributes:
        requests: Requests per simulation.
        rates: Points of each curve: "all", or some of "first" and "last".
        seed: Of lengths, arrivals and everything random.
        paper: Points to compare with.
    """

    requests: int
    rates: frozenset[str] = frozenset({"all"})
    seed: int = 0
    paper: PaperPoints = field(default_factory=PaperPoints)

    @classmethod
    def parse(cls, requests: int, rates: str, seed: int, reference: Path | None) -> "FigureOptions":
        """Options of the command line.

        Raises:
            InvalidRequestError: Unknown rates, or a reference that cannot be read.
        """
        chosen = frozenset(rates.split(","))
        if not chosen <= {"all", "first", "last"}:
            raise InvalidRequestError(f"--rates {rates}: must be all, first, last or first,last")
        return cls(requests, chosen, seed, PaperPoints.read(reference))

    def pick(self, points: Sequence[T]) -> list[T]:
        """The points of a curve that `rates` selects."""
        if "all" in self.rates:
            return list(points)
        ends = {"first": points[0], "last": points[-1]}
        return [point for name, point in ends.items() if name in self.rates]


#: (options, panel, series, metric) -> y of the paper by x.
PaperCurve = Callable[[FigureOptions, str, str, str], dict[float, float]]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the paper, or of an experiment of our own.

    Attributes:
        number: In the paper; None for our own.
        scenarios: The simulations that it needs.
        paper_curve: The paper's points, for a figure with a point per simulation and metric.
        points: Its points, for any other figure; it may also measure something itself.
        findings: The paper's statements about the figure with our numbers, one line each.
        time_series: Points are joined without marks.
    """

    number: int | None
    name: str
    title: str
    x_label: str
    metrics: tuple[Metric, ...]
    scenarios: Callable[[FigureOptions], list[PlottedScenario]] = lambda options: []
    paper_curve: PaperCurve = lambda options, panel, series, metric: {}
    points: Callable[[FigureOptions, Results, rich.console.Console], list[FigurePoint]] | None = None
    findings: Callable[[Sequence[FigurePoint]], list[str]] = lambda points: []
    log_x: bool = False
    time_series: bool = False

    @property
    def file_name(self) -> str:
        return f"figure{self.number}-{self.name}" if self.number else self.name

    @property
    def heading(self) -> str:
        return f"Figure {self.number}: {self.title}" if self.number else self.title

    def all_points(
        self, options: FigureOptions, results: Results, console: rich.console.Console
    ) -> list[FigurePoint]:
        """The points of the figure."""
        if self.points is not None:
            return self.points(options, results, console)
        return points_of(self.scenarios(options), self.metrics, results, options, self.paper_curve)


def points_of(
    scenarios: Sequence[PlottedScenario],
    metrics: Sequence[Metric],
    results: Results,
    options: FigureOptions,
    paper_curve: PaperCurve,
) -> list[FigurePoint]:
    """A point per simulation and metric, and the paper's points at other x."""
    found: dict[tuple[str, str, str], dict[float, float | None]] = {}
    for one in scenarios:
        for metric in metrics:
            curve = found.setdefault((one.panel, one.series, metric.name), {})
            curve[one.x] = metric.of(results[one.scenario.key])
    points = []
    for (panel, series, name), ours in found.items():
        papers = paper_curve(options, panel, series, name)
        for x in sorted({*ours, *papers}):
            points.append(FigurePoint(panel, series, name, x, ours.get(x), papers.get(x)))
    return points
