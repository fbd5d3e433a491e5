"""A span of each request, within its client's; a child of each stage."""

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from migration.messages import CopyStage
from pd_serve.observe.recorder import RequestRecorder
from pd_serve.observe.tracing import RequestTracer, traces_endpoint
from router.request import NewRequest
from tests.unit.pd_serve.made_migrations import FULL, migrated

UNIX = 1_000_000.0
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class World:
    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        tracer = RequestTracer(UNIX, provider.get_tracer("test"))
        self.recorder = RequestRecorder([tracer])

    def served(self, traceparent: str | None = PARENT, outcome: str = "stop") -> None:
        headers = {"traceparent": traceparent} if traceparent else None
        self.recorder.issued("r", 10.0, NewRequest(7), name="cmpl-x", trace_headers=headers)
        self.recorder.dispatched("r", "p0", "prefill", 11.0)
        self.recorder.first_token_from("r", "p0", "prefill", 15.0, prefill_s=3.0)
        self.recorder.first_token_from("r", "d0", "decode", 17.0, gap_s=2.0)
        copies = (CopyStage(0.5, 1.0, 4), CopyStage(1.25, 1.5, 1))
        self.recorder.migrated(migrated(stages=2, duration_s=2.0, copies=copies), 17.0)
        self.recorder.ended("r", outcome, 20.0, tokens=5)

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self._exporter.get_finished_spans()}


def seconds(span: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time / 1e9 - UNIX, span.end_time / 1e9 - UNIX


def test_a_request_has_a_span_and_its_stages_and_migrations_are_children() -> None:
    world = World()
    world.served()
    spans = world.spans

    assert {name: seconds(span) for name, span in spans.items()} == {
        "request": (10.0, 20.0),
        "dispatch": (10.0, 11.0),
        "queue": (11.0, 12.0),
        "prefill": (12.0, 15.0),
        "handoff": (15.0, 17.0),
        "decode": (17.0, 20.0),
        "migration": (15.0, 17.0),
        "stage": (15.5, 16.0),
        "tail": (16.25, 16.5),
    }
    parents = {name: span.parent.span_id if span.parent else None for name, span in spans.items()}
    root, migration = spans["request"].context, spans["migration"].context
    assert root is not None
    assert migration is not None
    assert parents.pop("request") == 0xB7AD6B7169203331
    assert {parents.pop("stage"), parents.pop("tail")} == {migration.span_id}
    assert set(parents.values()) == {root.span_id}
    assert {span.context.trace_id for span in spans.values() if span.context} == {
        0x0AF7651916CD43DD8448EB211C80319C
    }
    assert (spans["request"].attributes or {})["gen_ai.usage.output_tokens"] == 5


def test_spans_have_the_instance_and_the_code_of_a_refusal() -> None:
    world = World()
    world.recorder.issued("r", 10.0, NewRequest(7))
    world.recorder.dispatched("r", "p0", "prefill", 11.0)
    world.recorder.migrated(migrated(refusal=FULL), 12.0)

    assert (world.spans["dispatch"].attributes or {})["pd_serve.instance"] == "p0"
    attributes = world.spans["migration"].attributes or {}
    assert attributes["pd_serve.migration.outcome"] == "aborted"
    assert attributes["pd_serve.migration.code"] == "no_free_blocks"


def test_without_a_clients_span_a_request_starts_a_trace() -> None:
    world = World()
    world.served(traceparent=None)

    assert world.spans["request"].parent is None


def test_a_request_whose_client_is_not_sampled_has_no_spans() -> None:
    world = World()
    world.served(traceparent=PARENT[:-1] + "0")

    assert world.spans == {}


def test_a_failed_request_has_a_span_with_status_error() -> None:
    world = World()
    world.served(outcome="error")

    assert world.spans["request"].status.status_code is StatusCode.ERROR


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, "http://c:4317"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "http://c:4318/v1/traces",
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t/x"},
            "http://t/x",
        ),
    ],
)
def test_the_endpoint_comes_from_opentelemetrys_variables(
    environment: dict[str, str], endpoint: str | None
) -> None:
    assert traces_endpoint(environment) == endpoint
