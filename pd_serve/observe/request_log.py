"""Logs one line for every step of a request, as seen by its API server."""

import logging

from pd_serve.observe.recorder import Observer, RecomputeReason
from pd_serve.observe.timeline import ObservedMigration, Stay, Timeline

logger = logging.getLogger(__name__)


class RequestLog(Observer):
    """Args: `level` of the lines."""

    def __init__(self, level: int) -> None:
        self._level = level

    def issued(self, request: Timeline) -> None:
        self._say(
            request,
            "issued",
            f"issued as {request.name}, {request.prompt_tokens} prompt tokens",
            client_id=request.name,
            prompt_tokens=request.prompt_tokens,
        )

    def dispatched(self, request: Timeline, stay: Stay) -> None:
        self._say(request, "dispatched", f"sent to {stay.instance}", instance=stay.instance)

    def first_token(self, request: Timeline) -> None:
        assert request.first_token_at is not None
        ttft_s, instance = request.first_token_at - request.issued_at, request.stays[-1].instance
        self._say(
            request,
            "prefilled",
            f"first token from {instance} after {ttft_s:.3f} s",
            instance=instance,
            ttft_s=round(ttft_s, 6),
        )

    def moved(self, request: Timeline, stay: Stay) -> None:
        self._say(request, "moved", f"decodes on {stay.instance}", instance=stay.instance)

    def migrated(self, request: Timeline, migration: ObservedMigration) -> None:
        record = migration.record
        self._say(
            request,
            "migrated",
            f"{record.reason} {record.source} -> {record.destination} {record.outcome}",
            reason=record.reason,
            source=record.source,
            destination=record.destination,
            outcome=record.outcome,
            code=None if record.refusal is None else record.refusal.code.value,
            why=record.why,
            stages=record.stages,
            blocks=record.blocks,
        )

    def lost(self, request: Timeline, instance: str, reason: RecomputeReason) -> None:
        self._say(request, "lost", f"lost with {instance} ({reason})", instance=instance, reason=reason)

    def ended(self, request: Timeline) -> None:
        assert request.ended_at is not None
        duration_s = request.ended_at - request.issued_at
        self._say(
            request,
            "ended",
            f"{request.outcome} after {duration_s:.3f} s and {request.output_tokens} tokens",
            outcome=request.outcome,
            duration_s=round(duration_s, 6),
            output_tokens=request.output_tokens,
            longest_gap_s=round(request.longest_gap_s, 6),
        )

    def _say(self, request: Timeline, event: str, text: str, **fields: object) -> None:
        extra = {"event": event, **fields}
        logger.log(self._level, "request %s: %s", request.request_id, text, extra=extra)
