"""OpenTelemetry spans: one per request, a child of the client's span; within it one per stage."""

import os
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pd_serve.observe.recorder import Observer, RecomputeReason
from pd_serve.observe.timeline import ObservedMigration, RequestStage, Timeline


def traces_endpoint(environment: Mapping[str, str]) -> str | None:
    """The endpoint for spans by OpenTelemetry's environment variables; None if they set none.

    Source: OpenTelemetry specification, "OTLP exporter configuration".
    """
    if endpoint := environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        return endpoint
    if endpoint := environment.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        over_http = _protocol(environment).startswith("http")
        return f"{endpoint.rstrip('/')}/v1/traces" if over_http else endpoint
    return None


def prepare_tracing() -> None:
    """Sets defaults of the environment variables that vLLM's exporter reads."""
    os.environ.setdefault("OTEL_SERVICE_NAME", "pd-serve")
    os.environ.setdefault("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", _protocol(os.environ))


def _protocol(environment: Mapping[str, str]) -> str:
    general = environment.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    return environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", general)


class RequestTracer(Observer):
    """Makes a span for each request, and within it one for each ended stage and migration.

    Args:
        unix_offset_s: Added to a time of the recorder's clock, it gives Unix time.
        tracer: By default that of the provider that vLLM sets up for its own spans.
    """

    def __init__(self, unix_offset_s: float, tracer: Tracer | None = None) -> None:
        self._unix_offset_s = unix_offset_s
        self._tracer = tracer or trace.get_tracer("pd_serve")
        self._propagator = TraceContextTextMapPropagator()

    def issued(self, request: Timeline) -> None:
        parent = self._propagator.extract(request.trace_headers or {})
        request.trace = self._tracer.start_span(
            "request",
            context=parent,
            kind=SpanKind.SERVER,
            start_time=self._ns(request.issued_at),
            attributes={
                "pd_serve.request.id": request.request_id,
                "pd_serve.request.name": request.name,
                "pd_serve.request.priority": request.priority,
                "gen_ai.usage.input_tokens": request.prompt_tokens,
            },
        )

    def stage(self, request: Timeline, stage: RequestStage) -> None:
        self._span(
            request.trace,
            stage.name,
            stage.begin,
            stage.end,
            {"pd_serve.instance": stage.instance},
        )

    def migrated(self, request: Timeline, migration: ObservedMigration) -> None:
        record = migration.record
        span = self._span(
            request.trace,
            "migration",
            migration.begin,
            migration.end,
            {
                "pd_serve.migration.reason": record.reason,
                "pd_serve.migration.source": record.source,
                "pd_serve.migration.destination": record.destination,
                "pd_serve.migration.outcome": record.outcome,
                "pd_serve.migration.code": "" if record.refusal is None else record.refusal.code.value,
                "pd_serve.migration.why": record.why,
                "pd_serve.migration.blocks": record.blocks,
                "pd_serve.migration.bytes": record.bytes_copied,
            },
        )
        for number, copy in enumerate(record.copies, 1):
            is_tail = record.committed and number == len(record.copies)
            self._span(
                span,
                "tail" if is_tail else "stage",
                migration.begin + copy.begin_s,
                migration.begin + copy.end_s,
                {"pd_serve.migration.stage": number, "pd_serve.migration.blocks": copy.blocks},
            )

    def lost(self, request: Timeline, instance: str, reason: RecomputeReason) -> None:
        request.trace.add_event("lost", {"pd_serve.instance": instance, "pd_serve.reason": reason})

    def ended(self, request: Timeline) -> None:
        assert request.ended_at is not None
        span = request.trace
        span.set_attribute("pd_serve.request.outcome", request.outcome)
        span.set_attribute("pd_serve.request.longest_gap_s", request.longest_gap_s)
        span.set_attribute("gen_ai.usage.output_tokens", request.output_tokens)
        if request.outcome == "error":
            span.set_status(StatusCode.ERROR)
        span.end(self._ns(request.ended_at))

    def _span(self, parent: Any, name: str, begin: float, end: float, attributes: dict[str, Any]) -> Any:
        context = trace.set_span_in_context(parent, Context())
        span = self._tracer.start_span(
            name, context=context, start_time=self._ns(begin), attributes=attributes
        )
        span.end(self._ns(end))
        return span

    def _ns(self, at: float) -> int:
        return int((at + self._unix_offset_s) * 1e9)
