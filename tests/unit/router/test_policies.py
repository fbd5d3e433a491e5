"""Policy sets by name, with settings changed by name."""

import pytest

from router.dispatch import DISPATCH_POLICIES
from router.policies import POLICY_SETS, paper_threshold, policy_set


@pytest.mark.parametrize("name", ["round-robin", "queue", "p2c", "infaas++", "llumnix-paper", "llumnix"])
def test_every_set_of_the_name_is_there(name: str) -> None:
    policies = policy_set(name)

    assert policies.name == name
    assert policies.dispatch in DISPATCH_POLICIES
    assert policies.prefill_dispatch in DISPATCH_POLICIES


def test_the_papers_settings() -> None:
    """FACTS, sections 1 and 4."""
    paper = policy_set("llumnix-paper")

    assert (paper.migration_threshold, paper.scale_threshold, paper.scale_margin) == (3, 10, 50)
    assert (paper.rescheduling_interval_s, paper.scale_interval_s, paper.max_moves) == (0.2, 10, 1)
    assert (paper.dispatch, paper.rescheduling, paper.victim) == ("freest", "pairs", "shortest")
    assert (paper.headroom, paper.roles, paper.drain_after_s) == (True, False, 0)


def test_infaas_is_the_papers_dispatch_without_migration_and_priorities() -> None:
    infaas = policy_set("infaas++")

    assert (infaas.dispatch, infaas.rescheduling, infaas.headroom) == ("freest", "none", False)


@pytest.mark.parametrize(("trace", "threshold"), [("S-S", 3), ("L-L", 3), ("M-M", 10), ("S-L", 10), ("", 3)])
def test_the_papers_threshold_per_trace(trace: str, threshold: float) -> None:
    assert paper_threshold(trace) == threshold


def test_settings_are_changed_by_name() -> None:
    policies = policy_set("llumnix", migration_threshold=7, roles=1, dispatch="prefix", max_moves="2")

    assert (policies.migration_threshold, policies.roles, policies.dispatch) == (7.0, True, "prefix")
    assert policies.max_moves == 2
    assert POLICY_SETS["llumnix"].migration_threshold != 7


def test_an_unknown_set_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no policy 'fifo'; there are round-robin, queue, .*llumnix"):
        policy_set("fifo")


def test_an_unknown_setting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"no setting 'threshold'; there are dispatch, .*migration_threshold"
    ):
        policy_set("llumnix", threshold=1)


@pytest.mark.parametrize(
    ("setting", "value"), [("dispatch", "best"), ("migration_threshold", "much"), ("max_moves", 0.5)]
)
def test_a_value_that_a_setting_cannot_have_is_refused(setting: str, value: float | str) -> None:
    with pytest.raises(ValueError, match=f"policy 'llumnix': .*{setting}"):
        policy_set("llumnix", **{setting: value})
