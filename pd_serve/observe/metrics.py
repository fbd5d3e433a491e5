"""The service's own metrics, beside vLLM's on `/metrics`: what no engine knows of itself.

Here are those that are counted as things happen, each API server its own requests. Those that instances and
the scheduler report are in `pd_serve.observe.cluster_metrics`.
"""

from prometheus_client import Counter, Histogram

from pd_serve.observe.histogram import BatchHistogram

#: Seconds: from a short prompt on a fast GPU to a request that has waited in a full cluster.
LATENCY_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
#: Seconds between two tokens: from a small model alone to a stream that stands still.
GAP_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
#: Seconds that whole requests take.
DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)

# ---- requests

REQUESTS = Counter(
    "pd_serve_requests", "Requests that have ended, by outcome (stop, length, abort, error).", ["outcome"]
)
TTFT = Histogram(
    "pd_serve_time_to_first_token_seconds",
    "From the request's arrival at the router to its first token.",
    buckets=LATENCY_BUCKETS,
)
ITL = BatchHistogram(
    "pd_serve_inter_token_latency_seconds",
    "Between two outputs of a request, whichever instances they come from.",
    buckets=GAP_BUCKETS,
)
LONGEST_GAP = Histogram(
    "pd_serve_longest_token_gap_seconds",
    "Longest pause in the stream of a request, of those with more than one token.",
    buckets=GAP_BUCKETS,
)
DURATION = Histogram(
    "pd_serve_request_duration_seconds",
    "From the request's arrival at the router to its end, by outcome.",
    ["outcome"],
    buckets=DURATION_BUCKETS,
)
STAGE = Histogram(
    "pd_serve_request_stage_seconds",
    "Parts of a request's life: dispatch, queue, prefill, handoff (first token to the first one from "
    "elsewhere), decode (on one instance).",
    ["stage"],
    buckets=LATENCY_BUCKETS,
)
DISPATCHES = Counter(
    "pd_serve_dispatches", "Requests sent to an instance, recomputed ones too.", ["instance"]
)
RECOMPUTED = Counter("pd_serve_recomputed_requests", "Requests recomputed because their instance died.")

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
    "From the offer to the end of a committed migration, by reason.",
    ["reason"],
    buckets=LATENCY_BUCKETS,
)
MIGRATION_STAGES = Histogram(
    "pd_serve_migration_stages",
    "Rounds of copying of a committed migration, the tail included, by reason.",
    ["reason"],
    buckets=(1, 2, 3, 4, 5, 6, 8, 10, 15, 20),
)
STAGE_DURATION = Histogram(
    "pd_serve_migration_stage_seconds",
    "One round of copying of a committed migration, by kind (live, tail).",
    ["kind"],
    buckets=GAP_BUCKETS,
)
DOWNTIME = Histogram(
    "pd_serve_migration_downtime_seconds",
    "Gap between the last token from the source and the first from the destination, by reason.",
    ["reason"],
    buckets=GAP_BUCKETS,
)
MIGRATED_BLOCKS = Counter(
    "pd_serve_migrated_blocks", "KV blocks of requests that have moved, by reason.", ["reason"]
)
MIGRATED_BYTES = Counter(
    "pd_serve_migrated_bytes", "KV copied for requests that have moved, by reason.", ["reason"]
)

# ---- the service

INTEGRITY_CHECKS = Counter("pd_serve_integrity_checks", "Times that GET /cluster/integrity was asked.")
INTEGRITY_VIOLATIONS = Counter(
    "pd_serve_integrity_violations", "What those checks have found wrong; at rest there should be nothing."
)

# What has not happened yet is a 0, not a gap: so a graph shows the first time it does.
for _outcome in ("stop", "length", "abort", "error"):
    REQUESTS.labels(_outcome)
for _reason in ("handoff", "balance", "defragment", "drain", "manual"):
    for _outcome in ("committed", "aborted"):
        MIGRATIONS.labels(_reason, _outcome)
    MIGRATED_BLOCKS.labels(_reason)
    MIGRATED_BYTES.labels(_reason)
