"""From results of runs to points beside the paper's, for figures whose x is what was varied."""

from collections.abc import Callable, Iterable, Sequence

from loadtests.experiments.paper.figure import Metric, Point
from loadtests.experiments.runs import Results
from pd_serve.simulation.scenario import Scenario

#: (panel, series, x) of a run.
Place = tuple[str, str, float]


def points_of(
    runs: Iterable[tuple[Place, Scenario]],
    metrics: Sequence[Metric],
    results: Results,
    paper: Callable[[str, str, str], dict[float, float]],
) -> list[Point]:
    """A point per run and metric. Of the paper's curves also where nothing was run.

    Args:
        paper: (panel, series, metric) -> y by x.
    """
    found: dict[tuple[str, str, str], dict[float, float | None]] = {}
    for (panel, series, x), case in runs:
        for metric in metrics:
            found.setdefault((panel, series, metric.name), {})[x] = metric.of(results[case.key])
    points = []
    for (panel, series, name), ours in found.items():
        theirs = paper(panel, series, name)
        for x in sorted({*ours, *theirs}):
            points.append(Point(panel, series, name, x, ours.get(x), theirs.get(x)))
    return points
