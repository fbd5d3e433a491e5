"""Policy sets by name, with settings changed by name."""

import inspect

import pytest

from router.dispatch import DISPATCH
from router.plugins import PolicyError, PolicyKind
from router.policies import POLICY_KINDS, POLICY_SETS, SETTINGS, paper_threshold, policy_set


@pytest.mark.parametrize("name", ["round-robin", "queue", "p2c", "infaas++", "llumnix-paper", "llumnix"])
def test_every_set_of_the_name_is_there(name: str) -> None:
    policies = policy_set(name)

    assert policies.name == name
    assert policies.dispatch in DISPATCH.built_in
    assert policies.prefill_dispatch in DISPATCH.built_in


def test_the_papers_settings() -> None:
    """Llumnix (OSDI 2024), section 6.1, and its artifact."""
    paper = policy_set("llumnix-paper")

    assert (paper.migration_threshold, paper.scale_threshold, paper.scale_margin) == (3, 10, 50)
    assert (paper.rescheduling_interval_s, paper.scale_interval_s, paper.max_moves) == (0.2, 10, 1)
    assert (paper.dispatch, paper.rescheduling, paper.selection) == ("freest", "pairs", "shortest")
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
    ("setting", "value", "message"),
    [
        ("dispatch", "best", "dispatch: no dispatch policy 'best'; there are round-robin, .*prefix"),
        ("selection", "foo", "selection: no selection policy 'foo'; there are shortest, .*drain"),
        ("victim", "foo", "selection: no selection policy 'foo'"),
        ("handoff", "foo", "handoff: no handoff policy 'foo'; there are freest"),
        ("rescheduling", "foo", "there are none, pairs"),
        ("prefill_scaling", "foo", "there are freeness, backlog"),
        ("migration_threshold", "much", "migration_threshold must be a number, not 'much'"),
        ("migration_threshold", "nan", "migration_threshold must be a number, not 'nan'"),
        ("max_moves", 0.5, "max_moves must be an integer >= 1"),
        ("max_moves", "0", "max_moves must be an integer >= 1, not '0'"),
        ("bind_after_s", -1, "bind_after_s must be a number >= 0, not -1"),
        ("headroom", 1.5, "headroom must be a number >= 0 and <= 1"),
        ("late_binding", "perhaps", "late_binding must be true or false"),
        ("dispatch.bound", 1, "dispatch: 'freest' has no setting 'bound'; there are none"),
        ("threshold.bound", 1, "no setting 'threshold.bound'"),
        ("name", "mine", "no setting 'name'"),
        ("options", "{}", "no setting 'options'"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_the_allowed_ones(
    setting: str, value: object, message: str
) -> None:
    with pytest.raises(PolicyError, match=f"policy 'llumnix': .*{message}"):
        policy_set("llumnix", **{setting: value})


def test_the_former_name_of_a_setting_is_accepted() -> None:
    assert policy_set("llumnix", victim="latest") == policy_set("llumnix", selection="latest")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_meaning(name: str) -> None:
    assert SETTINGS[name].meaning.endswith(".")


@pytest.mark.parametrize("kind", POLICY_KINDS.values(), ids=POLICY_KINDS)
def test_every_policy_has_a_summary(kind: PolicyKind[object]) -> None:
    for policy in kind.built_in.values():
        assert inspect.getdoc(policy), policy
