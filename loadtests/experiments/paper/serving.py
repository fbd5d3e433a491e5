"""Figure 11: seven traces and three policies up to saturation, without autoscaling and priorities."""

from collections.abc import Sequence

from loadtests.experiments import comparison
from loadtests.experiments.figure import Figure, FigureOptions, FigurePoint, Metric, PlottedScenario
from loadtests.experiments.paper.setup import (
    BASELINE,
    LATENCIES,
    LLUMNIX,
    PAPER_NAMES,
    paper_curve,
    paper_scenario,
)
from pd_serve.simulation.workloads import TraceSpec

PAPER_KEY = "fig11_serving_16x_llama7b_a10"
METRICS = (*LATENCIES, Metric("Preemption Loss", ("preemption_loss_s",)))

#: By the paper's name: (our trace, requests/s, key of the paper's points). The rates of ShareGPT, S-S and L-L
#: are the paper's. Those of the others are not known and were found by trial with 10,000 requests: at the
#: last of them INFaaS++ has a prefill P99 of 12 to 72 s here, as in the paper at the last known rates.
TRACES: dict[str, tuple[str, tuple[float, ...], str]] = {
    "ShareGPT": ("sharegpt-paper", (7.0, 7.25, 7.5, 7.75, 8.0), "ShareGPT"),
    "BurstGPT": ("burstgpt", (8.25, 8.75, 9.25), "BurstGPT"),
    "S-S": ("s-s", (32.0, 33.0, 34.0, 35.0, 36.0), "S-S(128-128)"),
    "M-M": ("m-m", (6.25, 6.75, 7.25), "M-M(256-256)"),
    "L-L": ("l-l", (2.6, 2.7, 2.8, 2.9, 3.0), "L-L(512-512)"),
    "S-L": ("s-l", (3.5, 3.7, 3.9), "S-L(128-512)"),
    "L-S": ("l-s", (14.5, 15.5, 16.5), "L-S(512-128)"),
}


def _scenarios(options: FigureOptions) -> list[PlottedScenario]:
    scenarios = []
    for panel, (trace, rates, key) in TRACES.items():
        known = options.paper.values(PAPER_KEY, key, LLUMNIX, "qps")
        for rate in options.pick(known or rates):
            for policy, series in PAPER_NAMES.items():
                spec = TraceSpec(trace, rate, options.requests, "poisson", seed=options.seed)
                scenarios.append(PlottedScenario(panel, series, rate, paper_scenario(spec, policy)))
    return scenarios


def _findings(points: Sequence[FigurePoint]) -> list[str]:
    return [
        *comparison.against_targets(points),
        *comparison.factor_lines(
            points,
            ("Prefill P99", "Prefill Mean", "Decode P99", "Request P99"),
            BASELINE,
            LLUMNIX,
        ),
        *comparison.reduction_line(points, "Preemption Loss", BASELINE, LLUMNIX),
    ]


FIGURE = Figure(
    11,
    "serving",
    "Serving: 16 instances of LLaMA-7B on A10, Poisson arrivals",
    "requests/s",
    METRICS,
    _scenarios,
    paper_curve=paper_curve(PAPER_KEY, "qps", {panel: name for panel, (_, _, name) in TRACES.items()}),
    findings=_findings,
)
