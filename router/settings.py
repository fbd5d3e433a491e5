"""Every setting of the router, with its default, its meaning and its limits."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

from msgspec import Meta

from router.plugins import PolicyChoice, Value

T = TypeVar("T")


def setting(default: T, meaning: str, **limits: Any) -> T:
    """A field with its meaning and its limits, which are named as in `msgspec.Meta`."""
    found: T = field(default=default, metadata={"meta": Meta(description=meaning, **limits)})
    return found


@dataclass(frozen=True)
class PolicySet:
    """Which policy decides what, and with which settings. Freeness is in blocks per request.

    Attributes:
        options: Settings of the chosen policies themselves, such as "handoff.min_tokens" for the setting
            `min_tokens` of the policy that is chosen as `handoff`.
    """

    name: str

    dispatch: str = setting("freest", "Dispatch policy among neutral instances.")
    prefill_dispatch: str = setting(
        "backlog", "Dispatch policy among prefill instances, and neutral ones beside them."
    )
    itl_target_s: float = setting(
        0.0, "Target of the time per token: freeness is what memory and it leave; 0: none.", ge=0
    )
    late_binding: bool = setting(False, "Requests that no neutral instance has room for wait in one line.")
    kept_blocks: float = setting(
        0.0, "Free blocks that late binding keeps for each request that an instance has.", ge=0
    )
    bind_after_s: float = setting(15.0, "Wait after which an instance has to make room for the first.", ge=0)
    max_bound: float = setting(0.0625, "Share of the instances that may do so at a time.", ge=0, le=1)
    decode_prompt_tokens: int = setting(
        0, "Prompt tokens that a step of a decode instance may take; 0: prompts start elsewhere.", ge=0
    )
    headroom: float = setting(0.0, "Share of a pool that high priority keeps nearly empty.", ge=0, le=1)
    max_report_age_s: float = setting(3.0, "Instances without a report for longer take no part.", gt=0)

    handoff: str = setting("freest", "Hand-off policy: ranks decode instances.")

    rescheduling: str = setting("none", "Which instance gives a request to which.")
    defragment: bool = setting(True, "Instances make room for queued and preempted requests.")
    selection: str = setting("shortest", "Selection policy: which request moves.")
    rescheduling_interval_s: float = setting(0.2, "Least time between two rounds of moves.", gt=0)
    migration_threshold: float = setting(3.0, "Instances with less freeness give requests away.")
    max_moves: int = setting(1, "Migrations of one instance that rescheduling keeps in flight.", ge=1)

    scaling: str = setting("freeness", "Scaling policy of decode and neutral pools.")
    prefill_scaling: str = setting("busy", "Scaling policy of prefill pools.")
    scale_interval_s: float = setting(10.0, "Time between two changes of a pool.", ge=0)
    scale_threshold: float = setting(10.0, "freeness: grows with less average freeness.")
    scale_margin: float = setting(50.0, "freeness: shrinks if it stays this much above the threshold.", ge=0)
    busy_high: float = setting(0.75, "busy: grows if prefill instances are in steps for more.", gt=0, le=1)
    busy_low: float = setting(0.55, "busy: shrinks if fewer would stay below this.", ge=0, le=1)
    backlog_high_tokens: int = setting(8192, "backlog: grows with more prompt tokens per instance.", ge=0)
    backlog_low_tokens: int = setting(1024, "backlog: shrinks if fewer stay per instance.", ge=0)
    drain_after_s: float = setting(0.0, "Time that a pool has to be too large before it shrinks.", ge=0)

    forecast_s: float = setting(
        0.0,
        "Pools grow for the load in this time, by its trend: the start-up time of an instance, or 0 for off.",
        ge=0,
    )

    roles: bool = setting(False, "An idle instance of one pool may change its role.")

    options: dict[str, Value] = field(default_factory=dict)

    def choice(self, setting: str) -> PolicyChoice:
        """The policy that a setting such as `dispatch` names, with its own settings."""
        own = {key: value for key, value in self.options.items() if key.startswith(f"{setting}.")}
        settings = tuple((key.removeprefix(f"{setting}."), value) for key, value in own.items())
        return PolicyChoice(getattr(self, setting), settings)
