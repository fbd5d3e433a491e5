"""Metrics of requests and migrations, which every API server counts for its own requests.

Metrics of instances and scheduler are in `pd_serve.observe.cluster_metrics`.
"""

from collections.abc import Mapping
from typing import get_args

from prometheus_client import Counter, Gauge, Histogram

from pd_serve.comm.membership import InstanceInfo
from pd_serve.observe.histogram import BatchHistogram
from pd_serve.observe.recorder import Observer, RecomputeReason
from pd_serve.observe.timeline import ObservedMigration, RequestStage, Stay, Timeline

#: Seconds, from a short prompt on a fast GPU to a long wait in a full cluster.
LATENCY_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
#: Seconds between two tokens, from one request on a small model to a stalled stream.
GAP_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
#: Seconds of whole requests.
DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)

# ---- requests

REQUESTS = Counter(
    "pd_serve_requests", "Requests that have ended, by outcome (stop, length, abort, error).", ["outcome"]
)
TTFT = Histogram(
    "pd_serve_time_to_first_token_seconds",
    "Time from a request's arrival to its first token.",
    buckets=LATENCY_BUCKETS,
)
ITL = BatchHistogram(
    "pd_serve_inter_token_latency_seconds",
    "Time between two outputs of a request, on any instances.",
    buckets=GAP_BUCKETS,
)
LONGEST_GAP = Histogram(
    "pd_serve_longest_token_gap_seconds",
    "Longest pause in the stream of a request with more than one token.",
    buckets=GAP_BUCKETS,
)
DURATION = Histogram(
    "pd_serve_request_duration_seconds",
    "Time from a request's arrival to its end, by outcome.",
    ["outcome"],
    buckets=DURATION_BUCKETS,
)
STAGE = Histogram(
    "pd_serve_request_stage_seconds",
    "Time of a request's stages: dispatch, queue, prefill, handoff (first token to the first one of another "
    "instance), decode (on one instance).",
    ["stage"],
    buckets=LATENCY_BUCKETS,
)
DISPATCHES = Counter(
    "pd_serve_dispatches", "Requests sent to an instance, recomputed ones included.", ["instance"]
)
RECOMPUTED = Counter(
    "pd_serve_recomputed_requests",
    "Requests recomputed, by reason: their instance died (died), was stopped with them (stopped), has ended "
    "them because the manager had dropped this API server (dropped), could not be heard (out_of_reach), has "
    "sent tokens that never arrived (tokens_lost), does not have them (request_lost), or has continued them "
    "with other tokens than those delivered (fork).",
    ["reason"],
)
RECONCILIATIONS = Counter(
    "pd_serve_reconciliations",
    "Disagreements between instances and API server after lost messages, by kind: tokens sent again "
    "(resend), requests recomputed (recompute; out_of_reach where an instance could not be heard), and "
    "copies ended that no client waits for (unknown) or that were replaced (outdated).",
    ["kind"],
)

# ---- migrations

MIGRATIONS = Counter(
    "pd_serve_migrations",
    "Migrations that have ended, by reason (handoff, balance, defragment, drain, manual) and outcome "
    "(committed, aborted).",
    ["reason", "outcome"],
)
ABORTED_MIGRATIONS = Counter(
    "pd_serve_aborted_migrations",
    "Migrations that did not move their request, by reason and by the code of the refusal.",
    ["reason", "code"],
)
MIGRATION_DURATION = Histogram(
    "pd_serve_migration_duration_seconds",
    "Time from the offer to the end of a committed migration, by reason.",
    ["reason"],
    buckets=LATENCY_BUCKETS,
)
MIGRATION_STAGES = Histogram(
    "pd_serve_migration_stages",
    "Copy rounds of a committed migration, the tail included, by reason.",
    ["reason"],
    buckets=(1, 2, 3, 4, 5, 6, 8, 10, 15, 20),
)
STAGE_DURATION = Histogram(
    "pd_serve_migration_stage_seconds",
    "Time of one copy round of a committed migration, by kind (live, tail).",
    ["kind"],
    buckets=GAP_BUCKETS,
)
DOWNTIME = Histogram(
    "pd_serve_migration_downtime_seconds",
    "Time between the last token from the source and the first from the destination, by reason.",
    ["reason"],
    buckets=GAP_BUCKETS,
)
MIGRATED_BLOCKS = Counter(
    "pd_serve_migrated_blocks", "KV blocks copied by committed migrations, by reason.", ["reason"]
)
MIGRATED_BYTES = Counter(
    "pd_serve_migrated_bytes", "KV bytes copied by committed migrations, by reason.", ["reason"]
)

NODE_BYTES = Counter(
    "pd_serve_node_migrated_bytes",
    "KV bytes copied by committed migrations, by node of the source and of the destination.",
    ["source_node", "destination_node"],
)

# ---- targets

SLO_REQUESTS = Counter(
    "pd_serve_slo_requests",
    "Requests with targets that have ended; those refused are not among them.",
)
SLO_MET = Counter(
    "pd_serve_slo_met_requests",
    "Such requests that have met a target: time to first token (ttft), mean time per later token (itl), all "
    "that they have (all). The rate of the latter is the goodput.",
    ["target"],
)

# ---- API keys

KEY_REQUESTS = Counter("pd_serve_key_requests", "Requests that have ended, by API key.", ["key"])
KEY_PROMPT_TOKENS = Counter(
    "pd_serve_key_prompt_tokens", "Tokens of the prompts of these requests, by API key.", ["key"]
)
KEY_OUTPUT_TOKENS = Counter(
    "pd_serve_key_output_tokens", "Tokens of the outputs of these requests, by API key.", ["key"]
)
KEY_REFUSED = Counter("pd_serve_key_refused_requests", "Requests refused with 429, by API key.", ["key"])
KEY_WAITING = Gauge(
    "pd_serve_key_waiting_requests", "Requests of the API server without a first token, by API key.", ["key"]
)

# ---- the service

REFUSED_REQUESTS = Counter(
    "pd_serve_refused_requests",
    "Requests refused, by status and reason: 429 because too many wait (overloaded) or their target for the "
    "first token cannot be met (slo_unattainable) or a limit of their API key is reached "
    "(rate_limit_exceeded), 503 because no instance is available (no_instance).",
    ["status", "reason"],
)

INTEGRITY_CHECKS = Counter(
    "pd_serve_integrity_checks",
    "Checks of the cluster, by itself every minute and by GET /cluster/integrity.",
)
INTEGRITY_VIOLATIONS = Counter(
    "pd_serve_integrity_violations", "Violated invariants found by these checks; should be 0."
)
INTEGRITY_PROBLEMS = Gauge(
    "pd_serve_integrity_problems", "Violated invariants found by the last check that ran by itself."
)

# Exported as 0 before the first event, so that rates include it.
for _why in ("overloaded", "slo_unattainable", "rate_limit_exceeded"):
    REFUSED_REQUESTS.labels("429", _why)
REFUSED_REQUESTS.labels("503", "no_instance")
for _target in ("ttft", "itl", "all"):
    SLO_MET.labels(_target)
for _outcome in ("stop", "length", "abort", "error"):
    REQUESTS.labels(_outcome)
for _cause in get_args(RecomputeReason):
    RECOMPUTED.labels(_cause)
for _kind in ("resend", "recompute", "out_of_reach", "unknown", "outdated"):
    RECONCILIATIONS.labels(_kind)
for _reason in ("handoff", "balance", "defragment", "drain", "manual"):
    for _outcome in ("committed", "aborted"):
        MIGRATIONS.labels(_reason, _outcome)
    MIGRATED_BLOCKS.labels(_reason)
    MIGRATED_BYTES.labels(_reason)


def count_integrity_check(violations: list[str]) -> None:
    """Counts a check by GET /cluster/integrity, or one that ran by itself."""
    INTEGRITY_CHECKS.inc()
    INTEGRITY_VIOLATIONS.inc(len(violations))


def show_integrity(violations: list[str]) -> None:
    """Counts a check that ran by itself, and shows its result."""
    count_integrity_check(violations)
    INTEGRITY_PROBLEMS.set(len(violations))


class RequestMetrics(Observer):
    """Counts in the registry of the process; there is one per process."""

    def __init__(self) -> None:
        self._nodes: dict[str, str] = {}

    def instance_joined(self, info: InstanceInfo) -> None:
        self._nodes[info.instance_id] = info.node
        DISPATCHES.labels(info.instance_id)  # 0 before the first event

    def instance_left(self, instance_id: str) -> None:
        DISPATCHES.remove(instance_id)

    def dispatched(self, request: Timeline, stay: Stay) -> None:
        DISPATCHES.labels(stay.instance).inc()

    def first_token(self, request: Timeline) -> None:
        assert request.first_token_at is not None
        TTFT.observe(request.first_token_at - request.issued_at)

    def stage(self, request: Timeline, stage: RequestStage) -> None:
        STAGE.labels(stage.name).observe(stage.seconds)

    def migrated(self, request: Timeline, migration: ObservedMigration) -> None:
        record, reason = migration.record, migration.record.reason
        MIGRATIONS.labels(reason, record.outcome).inc()
        if record.refusal is not None:
            ABORTED_MIGRATIONS.labels(reason, record.refusal.code).inc()
            return
        MIGRATED_BLOCKS.labels(reason).inc(record.blocks)
        MIGRATED_BYTES.labels(reason).inc(record.bytes_copied)
        nodes = (self._nodes.get(instance, "") for instance in (record.source, record.destination))
        NODE_BYTES.labels(*nodes).inc(record.bytes_copied)
        MIGRATION_DURATION.labels(reason).observe(record.duration_s)
        MIGRATION_STAGES.labels(reason).observe(record.stages)
        for number, copy in enumerate(record.copies, 1):
            kind = "tail" if number == len(record.copies) else "live"
            STAGE_DURATION.labels(kind).observe(copy.end_s - copy.begin_s)

    def downtime(self, request: Timeline, migration: ObservedMigration) -> None:
        assert migration.downtime_s is not None
        DOWNTIME.labels(migration.record.reason).observe(migration.downtime_s)

    def lost(self, request: Timeline, instance: str, reason: RecomputeReason) -> None:
        RECOMPUTED.labels(reason).inc()

    def reconciled(self, kind: str, number: int) -> None:
        RECONCILIATIONS.labels(kind).inc(number)

    def ended(self, request: Timeline) -> None:
        assert request.ended_at is not None
        REQUESTS.labels(request.outcome).inc()
        DURATION.labels(request.outcome).observe(request.ended_at - request.issued_at)
        if (met := request.met) is not None:
            SLO_REQUESTS.inc()
            for target, is_met in (("ttft", met.ttft), ("itl", met.itl), ("all", met.all)):
                SLO_MET.labels(target).inc(is_met)
        if request.output_tokens > 1:
            LONGEST_GAP.observe(request.longest_gap_s)

    def token_gaps(self, gaps: Mapping[float, int]) -> None:
        for gap_s, count in gaps.items():
            ITL.observe(gap_s, count)
