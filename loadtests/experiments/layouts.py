"""`experiments layouts`: where disaggregation wins and where it loses, by hardware, workload and target.

The fast model of plans measures every layout: aggregated with every chunk size, and every split of prefill
and decode instances. The best layout of either kind then runs in the simulated cluster, with the real control
plane and our default policy, close to the rate that the better of both serves.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import rich.console

from loadtests.experiments.result_store import ExperimentRun, Results, run_scenarios
from loadtests.terminal import new_console
from pd_serve.observe import provenance
from pd_serve.planning.fast_cluster import Layout
from pd_serve.planning.search import Goal, LayoutPlan, plan
from pd_serve.planning.workload import planned_workload
from pd_serve.simulated_engine.hardware import Hardware, hardware
from pd_serve.simulation.scenario import Scenario
from pd_serve.simulation.workloads import TraceSpec
from router.slo import Slo

#: By cost model: number of GPUs, and a tight and a loose target: time to first token, time per later token.
HARDWARE: dict[str, tuple[int, dict[str, Slo]]] = {
    "a10-llama-7b": (16, {"tight": Slo(1.0, 0.07), "loose": Slo(5.0, 0.15)}),
    "h100-llama-3.1-8b": (8, {"tight": Slo(0.5, 0.015), "loose": Slo(2.0, 0.05)}),
    "h100x4-llama-3.1-70b": (32, {"tight": Slo(0.5, 0.025), "loose": Slo(2.0, 0.1)}),
}

#: By title: name of the trace: recorded lengths, mostly prompts, mostly answers.
TRACES = {"Azure conversation": "azure-conv", "2,000:100": "2000:100", "200:500": "200:500"}

#: Share of the better layout's goodput at which both run in the simulated cluster, and for how many seconds
#: at least: a queue that grows has to show.
SHARE, LEAST_S = 0.8, 40.0


@dataclass(frozen=True, slots=True)
class BestLayout:
    """The best layout of a kind, and what it serves.

    Attributes:
        goodput: In requests/s.
        attainment: In the simulated cluster, at `SHARE` of the better kind's goodput.
    """

    layout: str
    goodput: float
    attainment: float | None = None


@dataclass(frozen=True, slots=True)
class HardwareRow:
    """One workload on one hardware with one target.

    Attributes:
        default: Aggregated, with the default chunk size of vLLM on this GPU.
        wrong_split: The worst split of prefill and decode instances.
    """

    cost_model: str
    trace: str
    target: str
    slo: Slo
    default: BestLayout
    aggregated: BestLayout
    disaggregated: BestLayout
    wrong_split: BestLayout
    left_out: int

    @property
    def gain(self) -> float:
        """Goodput with disaggregation over that without."""
        return self.disaggregated.goodput / self.aggregated.goodput if self.aggregated.goodput else 0.0


@dataclass(frozen=True, slots=True)
class _PlannedRow:
    """A row without the simulated cluster, and the layouts that are to run there."""

    row: HardwareRow
    spec: TraceSpec
    best: dict[str, Layout]


def run_layouts(requests: int, run: ExperimentRun, cost_models: Sequence[str] = ()) -> None:
    """Writes `layouts.{json,md}`.

    Args:
        requests: Per run.
        cost_models: Of `HARDWARE`; all if there are none.

    Raises:
        PdServeError: A simulation failed, or a trace has no file.
    """
    console = new_console()
    at_start = provenance.provenance()
    planned = [
        _plan(TraceSpec(trace, None, requests), cost_model, title, target, run, console)
        for cost_model, (_, targets) in HARDWARE.items()
        if not cost_models or cost_model in cost_models
        for title, trace in TRACES.items()
        for target in targets
    ]
    scenarios = {id(one): _scenarios(one) for one in planned}
    results = run_scenarios([s for each in scenarios.values() for s in each.values()], run, console)
    rows = [_with_attainment(one.row, scenarios[id(one)], results) for one in planned]
    provenance.write(run.out / "layouts.json", {"rows": [asdict(row) for row in rows]} | at_start)
    table = markdown(rows)
    (run.out / "layouts.md").write_text(table, encoding="utf-8")
    console.print(table, markup=False)


def _plan(
    spec: TraceSpec,
    cost_model: str,
    title: str,
    target: str,
    run: ExperimentRun,
    console: rich.console.Console,
) -> _PlannedRow:
    gpus, targets = HARDWARE[cost_model]
    machine, slo = hardware(cost_model), targets[target]
    workload, about = planned_workload(spec, machine, run.traces)
    with console.status(f"{cost_model}, {title}, {target}"):
        plans = plan(workload, machine, gpus, Goal(slo), jobs=run.jobs)
    best = {
        kind: next(one for one in plans if one.layout.is_disaggregated is (kind == "disaggregated"))
        for kind in ("aggregated", "disaggregated")
    }
    default = next(one for one in plans if _is_default(one.layout, machine))
    row = HardwareRow(
        cost_model,
        title,
        target,
        slo,
        _best(default),
        _best(best["aggregated"]),
        _best(best["disaggregated"]),
        _best(_wrong_split(plans)),
        about["left_out"],
    )
    rate = SHARE * max(one.goodput for one in best.values())
    size = max(spec.requests or 0, round(rate * LEAST_S))
    rated = replace(spec, rate=rate or None, requests=size, arrivals="poisson")
    return _PlannedRow(row, rated, {kind: one.layout for kind, one in best.items()})


def _is_default(layout: Layout, machine: Hardware) -> bool:
    return not layout.is_disaggregated and layout.chunk_tokens == machine.engine.chunk_tokens


def _wrong_split(plans: Sequence[LayoutPlan]) -> LayoutPlan:
    """The split that serves least with its better chunk size."""
    best_of: dict[int, LayoutPlan] = {}
    for one in plans:  # the best one comes first
        if one.layout.is_disaggregated:
            best_of.setdefault(one.layout.prefill, one)
    return min(best_of.values(), key=lambda one: one.goodput)


def _best(found: LayoutPlan) -> BestLayout:
    layout = found.layout
    chunk = f"chunk {layout.chunk_tokens:,}" if layout.chunk_tokens else "no chunks"
    name = f"{layout.prefill} + {layout.decode}" if layout.is_disaggregated else chunk
    return BestLayout(name, found.goodput)


def _scenarios(one: _PlannedRow) -> dict[str, Scenario]:
    """The simulations of a row by kind; none if no layout meets its target."""
    if one.spec.rate is None:
        return {}
    found = {}
    for kind, layout in one.best.items():
        instances = {"neutral": layout.neutral}
        if layout.is_disaggregated:
            instances = {"prefill": layout.prefill, "decode": layout.decode}
        chunk = layout.chunk_tokens or 0
        found[kind] = Scenario(
            one.spec, "llumnix", instances, {}, one.row.cost_model, chunk_tokens=chunk, slo=one.row.slo
        )
    return found


def _with_attainment(row: HardwareRow, scenarios: dict[str, Scenario], results: Results) -> HardwareRow:
    attained = {kind: results[scenario.key]["attainment"] for kind, scenario in scenarios.items()}
    return replace(
        row,
        aggregated=replace(row.aggregated, attainment=attained.get("aggregated")),
        disaggregated=replace(row.disaggregated, attainment=attained.get("disaggregated")),
    )


def markdown(rows: Sequence[HardwareRow]) -> str:
    """A row for each workload, hardware and target."""

    def share(kind: BestLayout) -> str:
        return "-" if kind.attainment is None else f"{kind.attainment:.1%}"

    lines = [
        "Goodput in requests/s: 90 % of the requests are within the target. The last column is the share",
        f"within it in the simulated cluster at {SHARE:.0%} of the better one's goodput: aggregated, PD.",
        "",
        "| GPUs | requests | target | vLLM's default | aggregated, best chunk | PD, best split |"
        " PD / aggregated | PD, worst split | in the cluster |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gpus = HARDWARE[row.cost_model][0]
        cells = (
            f"{gpus}: {row.cost_model}",
            row.trace + (f" ({row.left_out:,} left out)" if row.left_out else ""),
            f"{row.slo.ttft_s:g} s, {row.slo.tpot_s * 1e3:g} ms",
            f"{row.default.goodput:.1f}",
            f"{row.aggregated.goodput:.1f} ({row.aggregated.layout})",
            f"{row.disaggregated.goodput:.1f} ({row.disaggregated.layout})",
            f"{row.gain:.2f}" if row.gain else "-",
            f"{row.wrong_split.goodput:.1f} ({row.wrong_split.layout})",
            f"{share(row.aggregated)}, {share(row.disaggregated)}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
