"""The paper's figures as data: points, comparisons, tables, plots, with results made by hand."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import rich.console

from loadtests.experiments import arms, plots
from loadtests.experiments.paper import comparison, fragmentation, priorities, reproduce, scheduling, serving
from loadtests.experiments.paper.figure import Figure, Metric, Options, Point
from loadtests.experiments.paper.reference import Reference
from loadtests.experiments.runs import Results
from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.scenario import Scenario, run_scenario
from pd_serve.simulation.summary import Slo
from pd_serve.simulation.workloads import make_requests
from tests.unit.loadtests.experiments.made_results import stand_in

ALL, ENDS = frozenset({"all"}), frozenset({"first", "last"})

REFERENCE = Reference(
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
SIMULATED = [figure for number, figure in reproduce.FIGURES.items() if number not in (10, 16)]


def options(requests: int = 20, rates: frozenset[str] = ENDS, reference: Reference = REFERENCE) -> Options:
    return Options(requests, rates, 0, reference)


def results_of(cases: Sequence[Scenario]) -> Results:
    return {case.key: run_scenario(case, simulate=stand_in) | {"code": "this"} for case in cases}


def console() -> rich.console.Console:
    return rich.console.Console(file=io.StringIO(), width=300)


@pytest.mark.parametrize("figure", SIMULATED, ids=lambda figure: figure.name)
def test_every_figure_makes_points_of_its_cases(figure: Figure) -> None:
    chosen = options()
    cases = figure.cases(chosen)

    points = figure.points(chosen, results_of(cases), console())

    assert {p.metric for p in points} == {metric.name for metric in figure.metrics}
    assert any(p.ours is not None for p in points)
    assert all(isinstance(line, str) for line in figure.findings(points))


@pytest.mark.parametrize("figure", SIMULATED, ids=lambda figure: figure.name)
def test_cases_differ_and_are_the_papers(figure: Figure) -> None:
    cases = figure.cases(options(10_000, ALL, Reference()))

    assert len({case.key for case in cases}) == len(cases)
    papers = [case for case in cases if case.policy != "llumnix"]
    assert all(case.max_migrations == 1 and case.cost_model == "a10-llama-7b" for case in papers)
    assert all(make_requests(case.trace)[0].arrival_s == 0 for case in cases[:1])


def test_serving_has_all_traces_policies_and_rates() -> None:
    cases = serving.FIGURE.cases(options(10_000, ALL, Reference()))

    assert len(cases) == (3 * 5 + 4 * 3) * 3
    assert {case.policy for case in cases} == {"round-robin", "infaas++", "llumnix-paper"}


def test_rates_are_those_of_the_reference_where_it_has_them() -> None:
    cases = serving.FIGURE.cases(options(rates=ALL))

    assert sorted({case.trace.rate for case in cases if case.trace.name == "l-l"}) == [2.6, 3.0]
    assert len({case.trace.rate for case in cases if case.trace.name == "m-m"}) == 3


def test_points_stand_beside_the_papers() -> None:
    chosen = options()
    points = serving.FIGURE.points(chosen, results_of(serving.FIGURE.cases(chosen)), console())

    (point,) = [
        p for p in points if (p.panel, p.series, p.metric, p.x) == ("L-L", "INFaaS++", "Prefill P99", 3.0)
    ]
    assert (point.ours, point.paper) == (1.0, 8.0)


def test_llumnix_base_differs_in_scheduling_only() -> None:
    base, with_priorities = priorities.FIGURE.cases(options(rates=frozenset({"first"})))

    assert (base.one_class, with_priorities.one_class) == (True, False)
    assert base.trace == with_priorities.trace


def test_fragmentation_is_averaged_over_stretches() -> None:
    chosen = options()
    cases = fragmentation.FIGURE.cases(chosen)
    results = results_of(cases)
    for case, height in zip(cases, (0.1, 0.02), strict=True):
        results[case.key]["series"] = {"at_s": [*range(1200)], "fragmentation": [height, 0.0] * 600}

    points = fragmentation.FIGURE.points(chosen, results, console())

    assert [p.ours for p in points if p.series == "INFaaS++"] == [pytest.approx(5.0)] * 120
    assert (
        "INFaaS++ 5.00 %, Llumnix 1.00 %, 1 - Llumnix / INFaaS++ = 80%"
        in fragmentation.FIGURE.findings(points)[0]
    )


# ---- comparison


def point(
    series: str, x: float, ours: float | None, paper: float | None, metric: str = "Prefill P99"
) -> Point:
    return Point("L-L", series, metric, x, ours, paper)


def test_targets_say_what_was_reached() -> None:
    points = [point("Llumnix", 1, 1.2, 1.0), point("Llumnix", 2, 2.0, 1.0), point("Llumnix", 3, 1.1, 1.0)]
    points += [point("Llumnix", 1, 2.0, 1.0, "Decode P99"), point("Llumnix", 9, 2.0, None)]

    decode, prefill = comparison.against_targets(points)

    assert "median of ours / paper 2.00 over 1 points" in decode
    assert decode.endswith("MISSED")
    assert "median of ours / paper 1.20 over 3 points, from 1.10 to 2.00" in prefill
    assert prefill.endswith("reached")


def test_one_policy_over_another() -> None:
    points = [point("INFaaS++", 1, 4.0, 2.0), point("INFaaS++", 2, 9.0, 8.0)]
    points += [point("Llumnix", 1, 2.0, 1.0), point("Llumnix", 2, 1.0, 2.0)]

    (line,) = comparison.factor_lines(points, ["Prefill P99"], "INFaaS++", "Llumnix")

    assert "ours at best 9.0 (L-L, 2), geometric mean 4.24" in line
    assert "paper's points at best 4.0 (L-L, 2), geometric mean 2.83" in line
    (line,) = comparison.reduction_line(points, "Prefill P99", "INFaaS++", "Llumnix")
    assert "ours 69%; paper's points 62%" in line


def test_size_at_equal_latency() -> None:
    points = [point("INFaaS++", 10, 100.0, None), point("INFaaS++", 14, 1.0, None)]
    points += [point("Llumnix", 8, 10.0, None), point("Llumnix", 9, 1.0, None)]

    levels = comparison.at_equal_y(points, "Prefill P99", "L-L", "INFaaS++", "Llumnix", comparison.ours)

    assert [tuple(map(pytest.approx, level)) for level in levels] == [(1, 14, 9), (10, 12, 8)]
    assert comparison.at_equal_y(points, "Prefill P99", "L-L", "INFaaS++", "Llumnix", comparison.papers) == []


# ---- options and reference


def test_picking_points_of_a_curve() -> None:
    assert options(rates=ALL).pick([1, 2, 3]) == [1, 2, 3]
    assert options(rates=ENDS).pick([1, 2, 3]) == [1, 3]
    assert options(rates=frozenset({"last"})).pick([1, 2, 3]) == [3]
    with pytest.raises(InvalidRequestError, match="--rates middle"):
        Options.of(10, "middle", 0, None)


def test_a_reference_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        Reference.read(path)
    path.write_text("[]")
    with pytest.raises(InvalidRequestError, match="no points by name"):
        Reference.read(path)


def test_a_reference_answers_with_nothing_for_what_it_has_not() -> None:
    assert Reference().values("a", "b") == []
    assert REFERENCE.curve("fig13_priorities", "HighPriority", "Llumnix", x="cv", y="Request P99") == {}
    assert REFERENCE.curve("fig13_priorities", "HighPriority", "Llumnix", x="cv", y="Request Mean") == {
        2.0: 5.7
    }


def test_an_unknown_figure(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no figure 9: there are 10, 11, 12"):
        reproduce.run([9], options(), tmp_path, None, None, False)


# ---- files


FIGURE = Figure(
    99, "test", "A test", "requests/s", (Metric("Prefill P99", log=True), Metric("Decode P99")),
    lambda options: [], lambda options, results, console: [],
)  # fmt: skip
POINTS = [point("INFaaS++", 1, 4.0, 2.0), point("INFaaS++", 2, 9.0, None), point("Llumnix", 1, None, 3.0)]
POINTS += [point("Llumnix", 1, 0.5, 0.25, "Decode P99")]


def test_tables_and_plot_are_written(tmp_path: Path) -> None:
    reproduce.write(FIGURE, POINTS, ["a note"], tmp_path, console())

    rows = list(csv.DictReader((tmp_path / "figure99-test.csv").open()))
    page = (tmp_path / "figure99-test.md").read_text()
    assert rows[0]["ours/paper"] == "2"
    assert (rows[1]["paper"], rows[2]["ours"]) == ("", "")
    assert "| Prefill P99 (s), INFaaS++ | 4 (2) | 9 |" in page
    assert "- a note" in page
    assert "| Decode P99 | 2.00 | 1 |" in page
    assert (tmp_path / "figure99-test.png").stat().st_size > 5000


@pytest.mark.parametrize("values", [[], [0.0], [None]])
def test_plots_of_little(values: list[float | None], tmp_path: Path) -> None:
    plots.plot(
        FIGURE, [point("Llumnix", 1, value, None) for value in values] or POINTS[:1], tmp_path / "a.png"
    )

    assert (tmp_path / "a.png").exists()


def test_many_metrics_are_wrapped(tmp_path: Path) -> None:
    metrics = tuple(Metric(f"m{number}") for number in range(9))
    points = [Point(panel, "Llumnix", metric.name, 1, 1.0) for panel in "ab" for metric in metrics]

    plots.plot(replace(FIGURE, metrics=metrics), points, tmp_path / "a.svg")

    text = (tmp_path / "a.svg").read_text()
    assert all(f"<!-- {panel}: {metric.name} -->" in text for panel in "ab" for metric in metrics)


def test_without_matplotlib_there_are_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)

    reproduce.write(FIGURE, POINTS, [], tmp_path, console())

    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".md"]


# ---- what is measured in place


def test_decisions_on_made_up_loads_are_timed() -> None:
    policies = scheduling.policy_set("llumnix")

    assert 0 < scheduling.dispatch_ms(64, policies, repeats=2) < 100
    assert 0 < scheduling.round_ms(64, policies, repeats=2) < 1000


# ---- arms


def test_arms_get_the_same_requests_and_as_many_instances() -> None:
    runs = arms.runs_of(options(rates=ALL), Slo(), ["L-L"])

    assert {sum(case.instances.values()) for _, case in runs} == {16}
    by_rate: dict[float, set[str]] = {}
    for (_, _, rate), case in runs:
        by_rate.setdefault(rate, set()).add(json.dumps(case.trace.name) + str(case.trace))
    assert all(len(traces) == 1 for traces in by_rate.values())
    assert {arm for (_, arm, _), _ in runs} == set(arms.ARMS)


def test_arms_say_where_disaggregation_is_worse() -> None:
    points = [
        Point("L-L", arm, metric.name, 2.0, 1.0 + 0.5 * place if metric.name == "TTFT P99" else 1.0)
        for place, arm in enumerate(arms.ARMS)
        for metric in arms.METRICS
    ]

    (line,) = arms._findings(points)

    assert line.endswith("worse than aggregated in: TTFT P99 2.50 x")
