"""Names, metrics and settings of the paper's experiments."""

from typing import Any

from loadtests.experiments.figure import FigureOptions, Metric, PaperCurve
from pd_serve.simulation.config import FITTED_FRONT_END_S
from pd_serve.simulation.scenario import Scenario
from pd_serve.simulation.workloads import TraceSpec

#: The paper's names of our policy sets.
PAPER_NAMES = {"round-robin": "Round-Robin", "infaas++": "INFaaS++", "llumnix-paper": "Llumnix"}
BASELINE, LLUMNIX, OURS = "INFaaS++", "Llumnix", "our defaults"


def paper_scenario(trace: TraceSpec, policy: str, **changes: Any) -> Scenario:
    """A simulation as in the paper: one migration at a time, and its API server's delay."""
    return Scenario(trace, policy, max_migrations=1, front_end_s=FITTED_FRONT_END_S, **changes)


def paper_curve(key: str, x: str, panels: dict[str, str] | None = None) -> PaperCurve:
    """Reads the paper's curves of one figure.

    Args:
        key: Of the figure, in the paper's points.
        x: Name of the points' x.
        panels: Names of panels in the paper's points, where they differ from ours.
    """

    def curve(options: FigureOptions, panel: str, series: str, metric: str) -> dict[float, float]:
        return options.paper.curve(key, (panels or {}).get(panel, panel), series, x=x, y=metric)

    return curve


LATENCIES = (
    Metric("Request P99", ("request_s", "p99")),
    Metric("Request Mean", ("request_s", "mean")),
    Metric("Prefill P99", ("prefill_s", "p99"), log=True),
    Metric("Prefill Mean", ("prefill_s", "mean"), log=True),
    Metric("Decode P99", ("decode_s", "p99")),
    Metric("Decode Mean", ("decode_s", "mean")),
)

#: Requests that no instance has the memory for: numbers over the others only.
LEFT_OUT = Metric("Left out", ("left_out",), unit="requests")
