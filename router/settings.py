"""Every setting of the router, with its default, its limits and its meaning."""

from typing import Annotated

import msgspec
from msgspec import Meta

from router.plugins import PolicyChoice, Value


class PolicySet(msgspec.Struct, frozen=True):
    """Which policy decides what, and with which settings. Freeness is in blocks per request.

    Attributes:
        options: Settings of the chosen policies themselves, such as "dispatch.reserve" for the setting
            `reserve` of the policy that is chosen as `dispatch`.
    """

    name: str

    dispatch: Annotated[str, Meta(description="Dispatch policy among neutral instances.")] = "freest"
    prefill_dispatch: Annotated[str, Meta(description="Dispatch policy among prefill instances.")] = "backlog"
    late_binding: Annotated[
        bool, Meta(description="Requests that no neutral instance has room for wait in one line for all.")
    ] = False
    bind_after_s: Annotated[
        float,
        Meta(ge=0, description="Wait after which an instance has to make room for the first."),
    ] = 15.0
    max_bound: Annotated[
        float,
        Meta(ge=0, le=1, description="Share of the instances that may do so at a time."),
    ] = 0.0625
    headroom: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="Share of a pool that requests of high priority keep nearly empty.",
        ),
    ] = 0.0
    max_report_age_s: Annotated[
        float, Meta(gt=0, description="Instances without a report for longer take no part in decisions.")
    ] = 3.0

    handoff: Annotated[str, Meta(description="Hand-off policy: ranks decode instances.")] = "freest"

    rescheduling: Annotated[str, Meta(description="Which instance gives a request to which.")] = "none"
    defragment: Annotated[
        bool, Meta(description="Instances give requests away to make room for queued and preempted ones.")
    ] = True
    selection: Annotated[str, Meta(description="Selection policy: which request moves.")] = "shortest"
    rescheduling_interval_s: Annotated[
        float, Meta(gt=0, description="Least time between two rounds of moves.")
    ] = 0.2
    migration_threshold: Annotated[
        float, Meta(description="Instances with less freeness give requests away, others take them.")
    ] = 3.0
    max_moves: Annotated[
        int, Meta(ge=1, description="Migrations of one instance that rescheduling keeps in flight.")
    ] = 1

    scaling: Annotated[str, Meta(description="Scaling policy of decode and neutral pools.")] = "freeness"
    prefill_scaling: Annotated[str, Meta(description="Scaling policy of prefill pools.")] = "backlog"
    scale_interval_s: Annotated[float, Meta(ge=0, description="Time between two changes of a pool.")] = 10.0
    scale_threshold: Annotated[
        float, Meta(description="freeness: a pool with less average freeness grows.")
    ] = 10.0
    scale_margin: Annotated[
        float,
        Meta(ge=0, description="freeness: a pool shrinks if it would stay this much above the threshold."),
    ] = 50.0
    backlog_high_tokens: Annotated[
        int, Meta(ge=0, description="backlog: a pool with more prompt tokens waiting per instance grows.")
    ] = 8192
    backlog_low_tokens: Annotated[
        int, Meta(ge=0, description="backlog: a pool shrinks if fewer would wait per instance afterwards.")
    ] = 1024
    drain_after_s: Annotated[
        float, Meta(ge=0, description="Time that a pool has to be too large before it shrinks.")
    ] = 0.0

    roles: Annotated[bool, Meta(description="An idle instance of one pool may change its role.")] = False

    options: dict[str, Value] = {}

    def choice(self, setting: str) -> PolicyChoice:
        """The policy that a setting such as `dispatch` names, with its own settings."""
        own = {key: value for key, value in self.options.items() if key.startswith(f"{setting}.")}
        settings = tuple((key.removeprefix(f"{setting}."), value) for key, value in own.items())
        return PolicyChoice(getattr(self, setting), settings)
