"""`experiments turns`: second turns of conversations on four instances, with and without our rules for them.

Nine kinds of second turns, by the length of their new text and of their answer. All layouts have prefix
caches, and prompts start where most of them is cached, except in "PD 2 + 2, by backlog".
"""

import statistics
from collections.abc import Sequence

from loadtests.experiments.figure import Figure, FigureOptions, FigurePoint, Metric, PlottedScenario
from loadtests.experiments.figure_files import run_figures
from loadtests.experiments.paper.setup import LEFT_OUT
from loadtests.experiments.result_store import ExperimentRun
from pd_serve.simulation.scenario import Scenario
from pd_serve.simulation.workloads import TraceSpec
from router.slo import Slo

#: The first turn, and lengths of the second one's new text and answer, in tokens.
FIRST, TEXTS, ANSWERS = "2000:500", (64, 256, 1024), (64, 256, 1024)

#: Requests/s; both turns count.
RATES = (0.5, 2.0, 5.0, 10.0, 20.0)
LEAST_REQUESTS = 100

COST_MODEL = "h100-llama-3.1-8b"
SLO = Slo(0.5, 0.03)

SPLITS = ((1, 3), (2, 2), (3, 1))
AGGREGATED, BY_BACKLOG = "aggregated", "PD 2 + 2, by backlog"

Settings = dict[str, float | int | str]
CACHED_FIRST: Settings = {"prefill_dispatch": "prefix"}

#: By title: (instances by role, policy, changed settings).
LAYOUTS: dict[str, tuple[dict[str, int], str, Settings]] = {
    AGGREGATED: ({"neutral": 4}, "llumnix", {"dispatch": "prefix"}),
    BY_BACKLOG: ({"prefill": 2, "decode": 2}, "llumnix", {}),
    **{
        f"{title} {prefill} + {decode}": ({"prefill": prefill, "decode": decode}, policy, settings)
        for title, policy, settings in (
            ("PD", "llumnix", CACHED_FIRST),
            ("conditional", "conditional", Settings()),
        )
        for prefill, decode in SPLITS
    },
    "conditional, neutral": ({"neutral": 4}, "conditional", {"dispatch": "soonest"}),
}

#: Layouts without our rules, the best of which ours has to reach.
STATIC = [title for title in LAYOUTS if not title.startswith("conditional")]

TTFT, TPOT, ATTAINMENT = "Second TTFT Mean", "Second TPOT Mean", "Attainment"
METRICS = (
    Metric(TTFT, ("by_turn", "later", "prefill_s", "mean"), log=True),
    Metric("Second TTFT P99", ("by_turn", "later", "prefill_s", "p99"), log=True),
    Metric(TPOT, ("by_turn", "later", "decode_s", "mean")),
    Metric("Second TPOT P99", ("by_turn", "later", "decode_s", "p99")),
    Metric("First TTFT Mean", ("by_turn", "first", "prefill_s", "mean"), log=True),
    Metric("TPOT P99", ("decode_s", "p99")),
    Metric("Goodput", ("goodput",), unit="requests/s"),
    Metric(ATTAINMENT, ("attainment",), unit="share"),
    LEFT_OUT,
)


def scenarios_of(options: FigureOptions, seconds: float) -> list[PlottedScenario]:
    """Every layout with every kind of second turn at every rate.

    Args:
        seconds: Of arrivals; at low rates as many as `LEAST_REQUESTS` take.
    """
    scenarios = []
    for text in TEXTS:
        for answer in ANSWERS:
            for rate in options.pick(RATES):
                requests = max(LEAST_REQUESTS, round(rate * seconds))
                trace = TraceSpec(f"{FIRST}+{text}:{answer}", rate, requests, seed=options.seed)
                for title, (instances, policy, settings) in LAYOUTS.items():
                    scenario = Scenario(
                        trace, policy, instances, settings, COST_MODEL, prefix_caching=True, slo=SLO
                    )
                    scenarios.append(PlottedScenario(f"{text}:{answer}", title, rate, scenario))
    return scenarios


def run_turns(options: FigureOptions, seconds: float, run: ExperimentRun) -> None:
    """Writes `turns.{csv,md,png}` and `turns-provenance.json`.

    Raises:
        PdServeError: Simulations failed; the others are kept.
    """
    figure = Figure(
        None,
        "turns",
        f"Second turns (new text:answer) after {FIRST}, four instances of {COST_MODEL}; SLO {SLO.ttft_s:g} s "
        f"and {SLO.tpot_s * 1e3:g} ms",
        "requests/s",
        METRICS,
        lambda options: scenarios_of(options, seconds),
        findings=_findings,
        log_x=True,
    )
    run_figures([figure], options, run, "turns-provenance.json")


def _findings(points: Sequence[FigurePoint]) -> list[str]:
    """Each split with our rules beside the same one without, and beside the best layout of each point."""
    at = {(p.panel, p.x, p.series, p.metric): p.ours for p in points}
    places = list(dict.fromkeys((p.panel, p.x) for p in points))

    def ratio(metric: str, over: str, under: str) -> float:
        """Geometric mean over all kinds and rates."""
        return statistics.geometric_mean(
            mine / base
            for panel, x in places
            if (mine := at[panel, x, over, metric]) and (base := at[panel, x, under, metric])
        )

    lines = []
    for prefill, decode in SPLITS:
        ours, plain = f"conditional {prefill} + {decode}", f"PD {prefill} + {decode}"
        lines.append(
            f"{ours} against {plain}: second TTFT {ratio(TTFT, ours, plain):.2f} x, TPOT "
            f"{ratio(TPOT, ours, plain):.2f} x"
        )
    ours = "conditional 2 + 2"
    lines.append(
        f"{ours} against {BY_BACKLOG}: second TTFT {ratio(TTFT, ours, BY_BACKLOG):.2f} x, TPOT "
        f"{ratio(TPOT, ours, BY_BACKLOG):.2f} x"
    )
    for title in LAYOUTS:
        shares = [at[panel, x, title, ATTAINMENT] or 0.0 for panel, x in places]
        behind = sum(
            share < max(at[panel, x, other, ATTAINMENT] or 0.0 for other in STATIC)
            for share, (panel, x) in zip(shares, places, strict=True)
        )
        lines.append(
            f"{title}: attainment {min(shares):.1%} at least, {statistics.fmean(shares):.1%} in the mean; "
            f"below the best of the layouts without our rules at {behind} of {len(places)} points"
        )
    return lines
