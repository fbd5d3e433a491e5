"""Policy sets by name, and the check of every setting where it enters."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Annotated, Any

from router.dispatch import DISPATCH
from router.handoff import HANDOFF
from router.plugins import PolicyError, PolicyKind, Setting, installed, load_installed
from router.rescheduling import RESCHEDULING
from router.rescheduling.selection import SELECTION
from router.scaling import SCALING
from router.settings import PolicySet

__all__ = ["POLICY_KINDS", "PolicyError", "PolicySet", "paper_threshold", "policy_set", "policy_set_names"]

#: The default. docs/policies.md has the reason and the measured gain of each difference to the paper.
LLUMNIX = PolicySet(
    "llumnix",
    late_binding=True,
    headroom=0.2,
    rescheduling="pairs",
    selection="guarded",
    migration_threshold=10.0,
    max_moves=4,
    scale_threshold=20.0,
    scale_margin=10.0,
    drain_after_s=30.0,
)

POLICY_SETS: dict[str, PolicySet] = {
    policies.name: policies
    for policies in (
        PolicySet("round-robin", dispatch="round-robin", prefill_dispatch="round-robin"),
        PolicySet("queue", dispatch="queue", prefill_dispatch="queue"),
        PolicySet("p2c", dispatch="p2c", prefill_dispatch="p2c"),
        # Load-aware dispatch, no migration: the paper's strongest baseline.
        PolicySet("infaas++"),
        # The paper's settings, nothing else.
        PolicySet("llumnix-paper", headroom=1.0, rescheduling="pairs"),
        LLUMNIX,
        # The default, and prompts are computed where that is soonest, with prefixes from anywhere.
        replace(
            LLUMNIX,
            name="conditional",
            prefill_dispatch="soonest",
            handoff="prefix",
            decode_prompt_tokens=256,
        ),
    )
}

#: Entry point group of own policy sets.
GROUP = "pd_serve.policy_sets"

#: The kind of policy that a setting names.
POLICY_KINDS: dict[str, PolicyKind[Any]] = {
    "dispatch": DISPATCH,
    "prefill_dispatch": DISPATCH,
    "handoff": HANDOFF,
    "rescheduling": RESCHEDULING,
    "selection": SELECTION,
    "scaling": SCALING,
    "prefill_scaling": SCALING,
}

#: Settings of a policy set, by name.
SETTINGS: dict[str, Setting] = {
    field.name: Setting(field.name, Annotated[field.type, field.metadata["meta"]], field.default)
    for field in fields(PolicySet)
    if "meta" in field.metadata
}

#: Former names of settings.
ALIASES = {"victim": "selection"}

#: The paper's migration thresholds that are not 3, by trace. Source: Llumnix (OSDI 2024) and its artifact.
PAPER_THRESHOLDS = {"M-M": 10.0, "S-L": 10.0}


def paper_threshold(trace: str) -> float:
    """The `migration_threshold` that the paper's Llumnix ran a trace with ("S-S", "M-M", ...)."""
    return PAPER_THRESHOLDS.get(trace, POLICY_SETS["llumnix-paper"].migration_threshold)


def policy_set_names() -> list[str]:
    return [*POLICY_SETS, *(name for name in installed(GROUP) if name not in POLICY_SETS)]


def policy_set(name: str, /, **changes: object) -> PolicySet:
    """A policy set, with settings changed by name: those of the set ("max_moves"), and those of the policies
    that it names ("handoff.min_tokens"). Numbers may come as text.

    Raises:
        PolicyError: There is no such set, policy or setting, or a value is not allowed. The message names
            what is.
    """
    found = POLICY_SETS.get(name) or load_installed(GROUP, name, "policy", policy_set_names())
    if not isinstance(found, PolicySet):
        raise PolicyError(f"policy {name!r} is not a PolicySet")
    try:
        return _changed(found, {ALIASES.get(setting, setting): value for setting, value in changes.items()})
    except PolicyError as error:
        raise PolicyError(f"policy {name!r}: {error}") from error


def _changed(policies: PolicySet, changes: Mapping[str, object]) -> PolicySet:
    values = asdict(policies)
    options = dict(values.pop("options"))
    for setting, value in changes.items():
        if setting.partition(".")[0] in POLICY_KINDS and "." in setting:
            options[setting] = value
        elif setting in SETTINGS:
            values[setting] = value
        else:
            raise PolicyError(f"no setting {setting!r}; there are {', '.join(SETTINGS)}")
    checked = {setting: SETTINGS[setting].convert(values[setting]) for setting in SETTINGS}
    changed = PolicySet(policies.name, options=options, **checked)
    for setting, kind in POLICY_KINDS.items():
        try:
            kind.make(changed.choice(setting))
        except PolicyError as error:
            raise PolicyError(f"{setting}: {error}") from error
    return changed
