"""The paper's figures: their scenarios, and points of results made by hand."""

from pathlib import Path

import pytest

from loadtests.experiments.figure import Figure
from loadtests.experiments.paper import fragmentation, priorities, scheduling, serving
from loadtests.experiments.paper.all_figures import FIGURES, run_paper
from loadtests.experiments.paper_points import PaperPoints
from loadtests.experiments.result_store import ExperimentRun
from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.workloads import make_requests
from tests.unit.loadtests.experiments.made_figures import ALL, console, options, results_of

SIMULATED = [figure for number, figure in FIGURES.items() if number not in (10, 16)]


@pytest.mark.parametrize("figure", SIMULATED, ids=lambda figure: figure.name)
def test_every_figure_has_points_for_all_its_metrics(figure: Figure) -> None:
    chosen = options()

    points = figure.all_points(chosen, results_of(figure.scenarios(chosen)), console())

    assert {p.metric for p in points} == {metric.name for metric in figure.metrics}
    assert any(p.ours is not None for p in points)
    assert all(isinstance(line, str) for line in figure.findings(points))


@pytest.mark.parametrize("figure", SIMULATED, ids=lambda figure: figure.name)
def test_all_scenarios_differ_and_have_the_settings_of_the_paper(figure: Figure) -> None:
    scenarios = [one.scenario for one in figure.scenarios(options(10_000, ALL, PaperPoints()))]

    assert len({scenario.key for scenario in scenarios}) == len(scenarios)
    of_the_paper = [scenario for scenario in scenarios if scenario.policy != "llumnix"]
    assert all(one.max_migrations == 1 and one.cost_model == "a10-llama-7b" for one in of_the_paper)
    assert make_requests(scenarios[0].trace)[0].arrival_s == 0


def test_serving_has_all_traces_policies_and_rates() -> None:
    scenarios = serving.FIGURE.scenarios(options(10_000, ALL, PaperPoints()))

    assert len(scenarios) == (3 * 5 + 4 * 3) * 3
    assert {one.scenario.policy for one in scenarios} == {"round-robin", "infaas++", "llumnix-paper"}


def test_rates_are_those_of_the_paper_if_known() -> None:
    traces = [one.scenario.trace for one in serving.FIGURE.scenarios(options(rates=ALL))]

    assert sorted({trace.rate for trace in traces if trace.name == "l-l"}) == [2.6, 3.0]
    assert len({trace.rate for trace in traces if trace.name == "m-m"}) == 3


def test_points_have_the_papers_values() -> None:
    chosen = options()
    points = serving.FIGURE.all_points(chosen, results_of(serving.FIGURE.scenarios(chosen)), console())

    (point,) = [
        p for p in points if (p.panel, p.series, p.metric, p.x) == ("L-L", "INFaaS++", "Prefill P99", 3.0)
    ]
    assert (point.ours, point.paper) == (1.0, 8.0)


def test_llumnix_base_differs_in_scheduling_only() -> None:
    chosen = options(rates=frozenset({"first"}))
    base, with_priorities = (one.scenario for one in priorities.FIGURE.scenarios(chosen))

    assert (base.one_class, with_priorities.one_class) == (True, False)
    assert base.trace == with_priorities.trace


def test_fragmentation_is_averaged_over_intervals() -> None:
    chosen = options()
    scenarios = fragmentation.FIGURE.scenarios(chosen)
    results = results_of(scenarios)
    for one, height in zip(scenarios, (0.1, 0.02), strict=True):
        results[one.scenario.key]["series"] = {"at_s": [*range(1200)], "fragmentation": [height, 0.0] * 600}

    points = fragmentation.FIGURE.all_points(chosen, results, console())

    assert [p.ours for p in points if p.series == "INFaaS++"] == [pytest.approx(5.0)] * 120
    assert (
        "INFaaS++ 5.00 %, Llumnix 1.00 %, 1 - Llumnix / INFaaS++ = 80%"
        in fragmentation.FIGURE.findings(points)[0]
    )


def test_an_unknown_figure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no figure 9: there are 10, 11, 12"):
        run_paper([9], options(), ExperimentRun(tmp_path))


def test_decisions_on_synthetic_loads_are_timed() -> None:
    policies = scheduling.policy_set("llumnix")

    assert 0 < scheduling.dispatch_ms(64, policies, repeats=2) < 100
    assert 0 < scheduling.round_ms(64, policies, repeats=2) < 1000
