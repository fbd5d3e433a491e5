"""The timeline of a request: its stages, instances and migrations.

All times are in seconds of the API server's clock. `pd_serve.observe.recorder` fills timelines.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from migration.record import MigrationRecord
from router.slo import NO_SLO, Slo

#: Entries of each kind that a timeline keeps; the oldest ones are dropped.
MAX_ENTRIES = 100


@dataclass(frozen=True, slots=True)
class RequestStage:
    """A stage of a request.

    Attributes:
        name: `dispatch` (until it is sent to an instance), `queue` (until its prefill begins), `prefill`
            (until its first token), `handoff` (on the prefill instance, from the first token until the first
            token of another instance), `decode` (on one instance, until its last token there).
    """

    name: str
    instance: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(slots=True)
class Stay:
    """A request's time on one instance.

    Attributes:
        recompute: The request was sent here because its last instance died.
        begin: When it was sent to the instance, or its first token arrived from there.
        first_token_at: When its first token arrived from the instance; None while it is queued or prefilled.
        end: None while it is on the instance.
        gap_s: Time without a token before `first_token_at`, until it is assigned to a migration.
    """

    instance: str
    role: str
    begin: float
    recompute: bool = False
    first_token_at: float | None = None
    end: float | None = None
    gap_s: float | None = None


class ObservedMigration(msgspec.Struct):
    """One migration of a request, successful or not: its record, and times that the API server measures.

    Attributes:
        end: When the record arrived.
        downtime_s: Between the last token from the source and the first from the destination; None until
            both are known.
    """

    record: MigrationRecord
    end: float
    downtime_s: float | None = None

    @property
    def begin(self) -> float:
        return self.end - self.record.duration_s

    @property
    def downtime_ms(self) -> float:
        """0 if unknown: the request ended before its first token from the destination."""
        return (self.downtime_s or 0.0) * 1e3


class MetTargets(NamedTuple):
    """Whether a request has met its targets; one that it does not have is met, if it did not fail."""

    ttft: bool
    itl: bool

    @property
    def all(self) -> bool:
        return self.ttft and self.itl


@dataclass(slots=True)
class Timeline:
    """One request as seen by its API server.

    Attributes:
        request_id: The engines' id.
        name: vLLM's id of it: the `id` of the response, with a number for each prompt or choice.
        client_id: The client's `X-Request-Id`; "" without one.
        outcome: `stop`, `length`, `abort` or `error`, as in vLLM; empty while it is running.
        output_tokens: Set when the request ends.
        trace_headers: The client's trace context (`traceparent`, `tracestate`).
        slo: Its targets.
        account: Number of its API key.
        waits_since: When it was issued, or lost its instance.
        trace: Its span; set and used by the tracer only.
    """

    request_id: str
    name: str
    issued_at: float
    prompt_tokens: int
    priority: int
    trace_headers: Mapping[str, str] | None = None
    client_id: str = ""
    slo: Slo = NO_SLO
    account: int = 0
    first_token_at: float | None = None
    ended_at: float | None = None
    outcome: str = ""
    output_tokens: int = 0
    longest_gap_s: float = 0.0
    recomputes: int = 0
    waits_since: float = 0.0
    trace: Any = None
    stages: deque[RequestStage] = field(default_factory=lambda: deque(maxlen=MAX_ENTRIES))
    stays: deque[Stay] = field(default_factory=lambda: deque(maxlen=MAX_ENTRIES))
    migrations: deque[ObservedMigration] = field(default_factory=lambda: deque(maxlen=MAX_ENTRIES))

    @property
    def state(self) -> str:
        """`waiting` for an instance, `prefill`, `decode` or `ended`."""
        if self.ended_at is not None:
            return "ended"
        if not self.stays or self.stays[-1].end is not None:
            return "waiting"
        return "prefill" if self.stays[-1].first_token_at is None else "decode"

    @property
    def met(self) -> MetTargets | None:
        """Which targets the request has met; None without targets, before its end, or if its client has left
        before the first one could be missed."""
        if not self.slo.has_bounds or self.ended_at is None:
            return None
        ttft_s = (self.ended_at if self.first_token_at is None else self.first_token_at) - self.issued_at
        if self.outcome == "error":
            return MetTargets(False, False)
        if self.first_token_at is None:
            return None if ttft_s <= self.slo.ttft_s else MetTargets(False, False)
        tpot_s = (self.ended_at - self.first_token_at) / max(self.output_tokens - 1, 1)
        return MetTargets(ttft_s <= self.slo.ttft_s, tpot_s <= self.slo.tpot_s)

    @property
    def instance(self) -> str | None:
        """The instance that it is on now; None while it waits for one, and after its end."""
        return self.stays[-1].instance if self.state in ("prefill", "decode") else None

    def as_json(self, unix_offset_s: float = 0.0) -> dict[str, Any]:
        """The JSON of `GET /cluster/requests/{id}`. Times are in seconds since the request was issued.

        Args:
            unix_offset_s: Added to a time of the timeline, it gives Unix time.
        """

        def since(at: float | None) -> float | None:
            return None if at is None else round(at - self.issued_at, 6)

        def span(begin: float, end: float | None) -> dict[str, float | None]:
            return {"begin_s": since(begin), "end_s": since(end)}

        return {
            "id": self.request_id,
            "name": self.name,
            "state": self.state,
            "instance": self.instance,
            "outcome": self.outcome or None,
            "issued_at": round(self.issued_at + unix_offset_s, 3),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "priority": self.priority,
            "ttft_s": since(self.first_token_at),
            "e2e_s": since(self.ended_at),
            "longest_gap_s": round(self.longest_gap_s, 6),
            "recomputes": self.recomputes,
            "stages": [
                {"stage": stage.name, "instance": stage.instance, **span(stage.begin, stage.end)}
                for stage in self.stages
            ],
            "instances": [
                {
                    **{"instance": stay.instance, "role": stay.role, "recompute": stay.recompute},
                    **span(stay.begin, stay.end),
                }
                for stay in self.stays
            ],
            "migrations": [
                {
                    "reason": m.record.reason,
                    "source": m.record.source,
                    "destination": m.record.destination,
                    "outcome": m.record.outcome,
                    "code": None if m.record.refusal is None else m.record.refusal.code,
                    "why": m.record.why,
                    **span(m.begin, m.end),
                    "stages": [
                        {**span(m.begin + copy.begin_s, m.begin + copy.end_s), "blocks": copy.blocks}
                        for copy in m.record.copies
                    ],
                    "blocks": m.record.blocks,
                    "tokens": m.record.tokens,
                    "bytes": m.record.bytes_copied,
                    "downtime_s": None if m.downtime_s is None else round(m.downtime_s, 6),
                }
                for m in self.migrations
            ],
        }
