"""Options, results and points for tests of figures."""

import io
from collections.abc import Sequence

import rich.console

from loadtests.experiments.figure import Figure, FigureOptions, FigurePoint, Metric, PlottedScenario
from loadtests.experiments.paper_points import PaperPoints
from loadtests.experiments.result_store import Results
from pd_serve.simulation.scenario import run_scenario
from tests.unit.loadtests.experiments.made_results import stand_in

ALL, ENDS = frozenset({"all"}), frozenset({"first", "last"})

PAPER = PaperPoints(
    {
        "fig11_serving_16x_llama7b_a10": {
            "L-L(512-512)": {
                "INFaaS++": {"qps": [2.6, 3.0], "Prefill P99": [2.0, 8.0], "Preemption Loss": [1.0, 2.0]},
                "Llumnix": {"qps": [2.6, 3.0], "Prefill P99": [1.0, 1.0], "Preemption Loss": [0.1, 0.6]},
            }
        },
        "fig13_priorities": {"HighPriority": {"Llumnix": {"cv": [2.0], "Request Mean": [5.7]}}},
    }
)


def options(requests: int = 20, rates: frozenset[str] = ENDS, paper: PaperPoints = PAPER) -> FigureOptions:
    return FigureOptions(requests, rates, 0, paper)


def results_of(scenarios: Sequence[PlottedScenario]) -> Results:
    return {
        one.scenario.key: run_scenario(one.scenario, simulate=stand_in) | {"code": "this"}
        for one in scenarios
    }


def console() -> rich.console.Console:
    return rich.console.Console(file=io.StringIO(), width=300)


def point(
    series: str, x: float, ours: float | None, paper: float | None, metric: str = "Prefill P99"
) -> FigurePoint:
    return FigurePoint("L-L", series, metric, x, ours, paper)


FIGURE = Figure(99, "test", "A test", "requests/s", (Metric("Prefill P99", log=True), Metric("Decode P99")))
POINTS = [point("INFaaS++", 1, 4.0, 2.0), point("INFaaS++", 2, 9.0, None), point("Llumnix", 1, None, 3.0)]
POINTS += [point("Llumnix", 1, 0.5, 0.25, "Decode P99")]
