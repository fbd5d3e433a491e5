"""Policy sets by name: which policy decides what, and with which settings. Values, no code."""

from typing import Any, Literal

import msgspec

DispatchName = Literal["round-robin", "queue", "p2c", "freest", "backlog", "prefix"]
ReschedulingName = Literal["none", "pairs"]


class PolicySet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every setting of the router. Freeness is in blocks per request; see `router.freeness`.

    Attributes:
        dispatch: Where new requests start among neutral instances.
        prefill_dispatch: The same among prefill instances.
        late_binding: Requests that no neutral instance has room for wait with the dispatcher; see
            `router.waiting_line`.
        bind_after_s: How long the first of them waits before it is bound to one that has no room yet.
        max_bound: Share of the instances that may make room for one that is bound to them, at a time.
        headroom: Share of a pool's instances that requests of high priority keep nearly empty; 1 as in the
            paper, 0 for none. See `router.headroom`.
        max_report_age_s: Instances that have reported nothing for longer are not decided on.

        rescheduling: Who moves a request to whom.
        defragment: Queued and preempted requests count: an instance gives others away to make room for them.
        victim: Which request goes; see `router.rescheduling.selection`.
        rescheduling_interval_s: Least time between two rounds.
        migration_threshold: Less free instances give requests away, freer ones take them.
        max_moves: Migrations that rescheduling lets an instance have in flight.

        scale_interval_s: Time between two looks at a pool's size.
        scale_threshold: A decode or neutral pool with less average freeness grows.
        scale_margin: It shrinks if one instance less would leave it this much above the threshold.
        backlog_high_tokens: A prefill pool with more prompt tokens waiting per instance grows.
        backlog_low_tokens: It shrinks if one instance less would leave it below this.
        drain_after_s: How long a pool must have been too large before it shrinks.

        roles: An idle instance of one pool may serve the other.
    """

    name: str
    dispatch: DispatchName = "freest"
    prefill_dispatch: DispatchName = "backlog"
    late_binding: bool = False
    bind_after_s: float = 15.0
    max_bound: float = 0.0625
    headroom: float = 0.0
    max_report_age_s: float = 3.0

    rescheduling: ReschedulingName = "none"
    defragment: bool = True
    victim: str = "shortest"
    rescheduling_interval_s: float = 0.2
    migration_threshold: float = 3.0
    max_moves: int = 1

    scale_interval_s: float = 10.0
    scale_threshold: float = 10.0
    scale_margin: float = 50.0
    backlog_high_tokens: int = 8192
    backlog_low_tokens: int = 1024
    drain_after_s: float = 0.0

    roles: bool = False


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
        # Ours. What is not the paper's has its reason and its measured gain in docs/policies.md.
        PolicySet(
            "llumnix",
            late_binding=True,
            headroom=0.1,
            rescheduling="pairs",
            victim="guarded",
            migration_threshold=10.0,
            max_moves=4,
            scale_threshold=20.0,
            scale_margin=10.0,
            drain_after_s=30.0,
        ),
    )
}

#: The paper's migration thresholds that are not 3. Source: FACTS of this project, section 1.
PAPER_THRESHOLDS = {"M-M": 10.0, "S-L": 10.0}


def paper_threshold(trace: str) -> float:
    """The `migration_threshold` that the paper's Llumnix ran this trace with ("S-S", "M-M", ...)."""
    return PAPER_THRESHOLDS.get(trace, POLICY_SETS["llumnix-paper"].migration_threshold)


def policy_set(name: str, **overrides: float | int | str) -> PolicySet:
    """A policy set, with settings changed by name. Texts are taken for numbers where numbers belong.

    Raises:
        ValueError: no such set or setting, or a value that a setting cannot have.
    """
    if name not in POLICY_SETS:
        raise ValueError(f"no policy {name!r}; there are {', '.join(POLICY_SETS)}")
    known: dict[str, Any] = msgspec.structs.asdict(POLICY_SETS[name])
    settings = [setting for setting in known if setting != "name"]
    for setting in overrides:
        if setting not in settings:
            raise ValueError(f"policy {name!r} has no setting {setting!r}; there are {', '.join(settings)}")
    try:
        return msgspec.convert(known | overrides, PolicySet, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"policy {name!r}: {error}") from error
