"""Campaigns over seeds."""

import pytest

from pd_serve.simulation.faults import campaign
from pd_serve.simulation.faults.campaign import CampaignResult, run_campaign
from pd_serve.simulation.faults.run import RunResult
from pd_serve.simulation.faults.schedule import Schedule


def scripted(schedule: Schedule) -> RunResult:
    bad = schedule.seed % 4 == 3 and len(schedule.faults) > 0
    return RunResult([f"request {schedule.seed} hangs"] if bad else [], streams=2, tokens=10)


@pytest.mark.parametrize("workers", [1, 2])
def test_all_seeds_are_run_and_counted(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(campaign, "run", scripted)
    seen: list[int] = []

    result = run_campaign(range(8), 1, workers=workers, on_progress=lambda result: seen.append(result.seeds))

    assert (result.seeds, result.streams, result.tokens) == (8, 16, 80)
    assert [failed.seed for failed in result.failed] == [3, 7]
    assert seen == list(range(1, 9))


def test_a_campaign_until_a_failure_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "run", scripted)

    result = run_campaign(range(100), 1, until_failure=True, workers=1)

    assert result.seeds == 4
    (failed,) = result.failed
    assert failed.replay == "pd-serve simulate faults --tier 1 --seed 3 --faults 0 --trace"


def test_the_file_has_the_schedule_of_each_failing_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "run", scripted)

    content = run_campaign(range(4), 2, workers=1).as_json()

    (failed,) = content["failed"]
    assert failed["schedule"]["seed"] == 3
    assert failed["findings"] == ["request 3 hangs"]
    assert content["tier"] == 2


@pytest.mark.parametrize(("tier", "seeds"), [(1, 100), (2, 100), (3, 100), (4, 130)])
def test_the_first_seeds_have_no_findings(tier: int, seeds: int) -> None:
    """Three minutes of CPU; `pd-serve simulate faults` runs more. See docs/testing.md."""
    result: CampaignResult = run_campaign(range(seeds), tier)

    assert [(failed.seed, failed.findings) for failed in result.failed] == []
