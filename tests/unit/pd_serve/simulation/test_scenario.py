"""A case becomes a simulation's configuration, and its result a summary."""

import json
from dataclasses import replace

import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.scenario import Scenario, configure, run_scenario
from pd_serve.simulation.workloads import TraceSpec
from router.priority import PriorityClass, priority_class
from router.scaling import PoolBounds
from tests.unit.loadtests.experiments.made_results import stand_in

CASE = Scenario(TraceSpec("s-s", rate=5, requests=40, priority_fraction=0.25), "infaas++")


def test_different_cases_have_different_keys() -> None:
    others = [replace(CASE, policy="llumnix"), replace(CASE, overrides={"max_moves": 2})]
    others.append(replace(CASE, trace=replace(CASE.trace, seed=1)))

    assert CASE.key == replace(CASE).key
    assert len({CASE.key, *(other.key for other in others)}) == 4


def test_a_case_becomes_a_configuration() -> None:
    case = replace(CASE, instances={"neutral": 4}, autoscale={"neutral": PoolBounds(1, 8)}, num_blocks=700)

    config, classes, left_out = configure(case)

    assert config.instances == {"neutral": 4}
    assert config.autoscale == {"neutral": PoolBounds(1, 8)}
    assert config.engines["neutral"].num_blocks == 700
    assert classes == [priority_class(request.priority) for request in config.requests]
    assert classes.count(PriorityClass.HIGH) == 10
    assert left_out == 0


@pytest.mark.parametrize(("trace", "threshold"), [("m-m", 10), ("S-L", 10), ("s-s", 3)])
def test_the_papers_threshold_is_the_default_of_the_papers_policy(trace: str, threshold: float) -> None:
    case = replace(CASE, trace=replace(CASE.trace, name=trace), policy="llumnix-paper")

    assert configure(case)[0].overrides == {"migration_threshold": threshold}
    chosen = replace(case, overrides={"migration_threshold": 5})
    assert configure(chosen)[0].overrides == {"migration_threshold": 5}
    assert configure(replace(case, policy="llumnix"))[0].overrides == {}


def test_with_one_class_priorities_are_ignored_by_the_schedule_and_reported() -> None:
    case = replace(CASE, one_class=True)

    config, classes, _ = configure(case)
    summary = run_scenario(case, simulate=stand_in)

    assert {request.priority for request in config.requests} == {0}
    assert classes.count(PriorityClass.HIGH) == 10
    assert summary["by_priority"]["high"]["requests"] == 10


def test_requests_that_no_instance_could_hold_are_left_out_and_counted() -> None:
    case = replace(CASE, trace=TraceSpec("l-l", rate=1, requests=1000), num_blocks=200)

    summary = run_scenario(case, simulate=stand_in)

    assert summary["left_out"] > 0
    assert summary["requests"] + summary["left_out"] == 1000


def test_a_summary_contains_its_configuration() -> None:
    seen: list[tuple[int, int]] = []

    summary = run_scenario(CASE, None, lambda done, total: seen.append((done, total)), stand_in)

    assert json.loads(json.dumps(summary)) == json.loads(json.dumps(summary))
    assert (summary["seed"], summary["config"]["policy"]) == (0, "infaas++")
    assert summary["config"]["trace"]["rate"] == 5
    assert seen == [(40, 40)]
    assert "series" not in summary
    assert "series" in run_scenario(replace(CASE, with_series=True), simulate=stand_in)


@pytest.mark.parametrize("change", [{"policy": "best"}, {"overrides": {"luck": 1}}])
def test_unknown_policies_and_settings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=r"no policy 'best'|no setting 'luck'"):
        configure(replace(CASE, **change))  # type: ignore[arg-type]
