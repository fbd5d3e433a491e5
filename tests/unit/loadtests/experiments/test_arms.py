"""The arms with and without disaggregation."""

from loadtests.experiments import arms
from loadtests.experiments.figure import FigurePoint
from router.slo import Slo
from tests.unit.loadtests.experiments.made_figures import ALL, options


def test_all_arms_get_the_same_requests_and_16_instances() -> None:
    scenarios = arms.scenarios_of(options(rates=ALL), Slo(), ["L-L"])

    assert {sum(one.scenario.instances.values()) for one in scenarios} == {16}
    by_rate: dict[float, set[str]] = {}
    for one in scenarios:
        by_rate.setdefault(one.x, set()).add(str(one.scenario.trace))
    assert all(len(traces) == 1 for traces in by_rate.values())
    assert {one.series for one in scenarios} == set(arms.ARMS)


def test_findings_name_the_latencies_that_disaggregation_makes_worse() -> None:
    points = [
        FigurePoint("L-L", arm, metric.name, 2.0, 1.0 + 0.5 * place if metric.name == "TTFT P99" else 1.0)
        for place, arm in enumerate(arms.ARMS)
        for metric in arms.METRICS
    ]

    (line,) = arms._findings(points)

    assert line.endswith("worse than aggregated in: TTFT P99 2.50 x")
