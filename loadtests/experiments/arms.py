"""`experiments arms`: the same 16 instances and the same requests, with and without disaggregation.

A tenth of the requests has high priority. Only the last arm schedules by priority; all arms report it.
"""

from collections.abc import Sequence

from loadtests.experiments.figure import Figure, FigureOptions, FigurePoint, Metric, PlottedScenario
from loadtests.experiments.figure_files import run_figures
from loadtests.experiments.paper.setup import LEFT_OUT
from loadtests.experiments.result_store import ExperimentRun
from loadtests.terminal import new_console
from pd_serve.errors import InvalidRequestError
from pd_serve.simulation import trace_files
from pd_serve.simulation.scenario import Scenario
from pd_serve.simulation.workloads import TraceSpec
from router.slo import Slo

HIGH_SHARE = 0.1

#: By title: (trace, arrivals, requests/s, prefill instances of 16). The split has the best attainment without
#: rescheduling among 1 to 3 (L-L at 2.6/s) and 3 to 6 (Azure at 6/s) prefill instances, with 2,000 requests.
TRACES: dict[str, tuple[str, str, tuple[float, ...], int]] = {
    "L-L": ("l-l", "poisson", (2.0, 2.4, 2.8), 3),
    "Azure conversation": ("azure-conv", "recorded", (5.0, 6.0, 7.0), 4),
}

#: By title: (disaggregated, policy, changed settings, scheduled by priority).
ARMS: dict[str, tuple[bool, str, dict[str, float | int | str], bool]] = {
    "aggregated": (False, "infaas++", {}, False),
    "PD": (True, "llumnix", {"rescheduling": "none", "headroom": 0}, False),
    "PD, balancing": (True, "llumnix", {"headroom": 0, "defragment": 0}, False),
    "PD, de-fragmentation and priorities": (True, "llumnix", {}, True),
}

METRICS = (
    Metric("TTFT P99", ("prefill_s", "p99"), log=True),
    Metric("TTFT Mean", ("prefill_s", "mean"), log=True),
    Metric("TPOT P99", ("decode_s", "p99")),
    Metric("TPOT Mean", ("decode_s", "mean")),
    Metric("Longest gap P99", ("longest_gap_s", "p99")),
    Metric("High priority TTFT P99", ("by_priority", "high", "prefill_s", "p99"), log=True),
    Metric("High priority TPOT Mean", ("by_priority", "high", "decode_s", "mean")),
    Metric("Preemptions", ("preemptions",), unit="count"),
    Metric("Goodput", ("goodput",), unit="requests/s"),
    Metric("Attainment", ("attainment",), unit="share"),
    LEFT_OUT,
)


def scenarios_of(options: FigureOptions, slo: Slo, titles: Sequence[str]) -> list[PlottedScenario]:
    """Every arm on every trace at every rate."""
    scenarios = []
    for title in titles:
        trace, arrivals, rates, prefill = TRACES[title]
        for rate in options.pick(rates):
            spec = TraceSpec(trace, rate, options.requests, arrivals, HIGH_SHARE, options.seed)
            for arm, (disaggregated, policy, overrides, by_priority) in ARMS.items():
                cluster = {"prefill": prefill, "decode": 16 - prefill} if disaggregated else {"neutral": 16}
                scenario = Scenario(
                    spec, policy, instances=cluster, overrides=overrides, one_class=not by_priority, slo=slo
                )
                scenarios.append(PlottedScenario(title, arm, rate, scenario))
    return scenarios


def run_arms(options: FigureOptions, slo: Slo, run: ExperimentRun) -> None:
    """Writes `arms.{csv,md,png}` and `arms-provenance.json`. A trace without a file is left out.

    Raises:
        PdServeError: Simulations failed; the others are kept.
    """
    titles = _available_traces(run)
    figure = Figure(
        None,
        "arms",
        f"16 instances with and without disaggregation; SLO {slo.ttft_s:g} s to the first token, "
        f"{slo.tpot_s * 1e3:g} ms for each later one",
        "requests/s",
        METRICS,
        lambda options: scenarios_of(options, slo, titles),
        findings=_findings,
    )
    run_figures([figure], options, run, "arms-provenance.json")


def _available_traces(run: ExperimentRun) -> list[str]:
    available = []
    for title, (trace, *_) in TRACES.items():
        try:
            if trace in trace_files.FILES:
                trace_files.find(trace, run.traces)
            available.append(title)
        except InvalidRequestError as error:
            new_console().print(f"[yellow]warning[/]  left out: {error}")
    return available


def _findings(points: Sequence[FigurePoint]) -> list[str]:
    """Per trace and rate: the arm with the best goodput, and where disaggregation is worse."""
    at = {(p.panel, p.x, p.metric, p.series): p.ours for p in points}
    lines = []
    for panel, x in dict.fromkeys((p.panel, p.x) for p in points):
        goodput = {arm: at[panel, x, "Goodput", arm] or 0.0 for arm in ARMS}
        best = max(goodput, key=lambda arm: goodput[arm])
        worse = [
            f"{metric} {mine / base:.2f} x"
            for metric in ("TTFT P99", "TTFT Mean", "TPOT P99", "TPOT Mean", "Longest gap P99")
            if (base := at[panel, x, metric, "aggregated"])
            and (mine := at[panel, x, metric, "PD, de-fragmentation and priorities"])
            and mine > base
        ]
        lines.append(
            f"{panel} at {x:g}/s: best goodput {goodput[best]:.2f}/s with {best} (aggregated "
            f"{goodput['aggregated']:.2f}/s); the full PD arm is worse than aggregated in: "
            + (", ".join(worse) or "none of the latencies")
        )
    return lines
