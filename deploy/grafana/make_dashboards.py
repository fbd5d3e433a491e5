"""What is on the dashboards. Writes dashboards/*.json:

python -m deploy.grafana.make_dashboards
"""

from pathlib import Path

from deploy.grafana.panels import (
    OF_INSTANCE,
    RATE,
    Dashboard,
    Panel,
    mean,
    of_instances,
    quantiles,
    rate,
    rate_of_instances,
    rendered,
)

FOLDER = Path(__file__).parent / "dashboards"

OVERVIEW = Dashboard(
    "overview",
    "pd-serve / Overview",
    {
        "Now": [
            Panel(
                "In progress",
                "Requests, waiting ones included.",
                {"": "sum(pd_serve_running_requests)"},
                kind="stat",
            ),
            Panel(
                "Instances",
                "That report.",
                {"": "count(max by (instance) (pd_serve_instance_info))"},
                kind="stat",
            ),
            Panel(
                "Scheduler",
                "1 while it reports; without it nothing is moved, drained or scaled.",
                {"": "max(pd_serve_scheduler_up)"},
                kind="stat",
            ),
            Panel(
                "Violations",
                "By GET /cluster/integrity, and migration messages that made no sense. Should be 0.",
                {
                    "": "sum(pd_serve_integrity_violations_total)"
                    " + sum(max by (instance) (pd_serve_instance_protocol_errors_total))"
                },
                kind="stat",
            ),
        ],
        "What clients see": [
            Panel(
                "Time to first token",
                "From the arrival at the router.",
                quantiles("pd_serve_time_to_first_token_seconds", 0.5, 0.9, 0.99),
                "s",
            ),
            Panel(
                "Inter-token latency",
                "Between two outputs of a request, wherever they come from.",
                quantiles("pd_serve_inter_token_latency_seconds", 0.5, 0.9, 0.99),
                "s",
            ),
            Panel(
                "Longest gap",
                "The longest pause in each stream that has ended: migrations, preemptions, crowded steps.",
                quantiles("pd_serve_longest_token_gap_seconds", 0.5, 0.9, 0.99),
                "s",
            ),
            Panel(
                "Request duration",
                "From arrival to end.",
                quantiles("pd_serve_request_duration_seconds", 0.5, 0.9, 0.99),
                "s",
            ),
        ],
        "Traffic": [
            Panel(
                "Requests",
                "Ended, by outcome.",
                {"{{outcome}}": rate("pd_serve_requests_total", "outcome")},
                "reqps",
                stacked=True,
            ),
            Panel(
                "Tokens",
                "As vLLM counts them.",
                {
                    "prompt": rate("vllm:prompt_tokens_total"),
                    "generated": rate("vllm:generation_tokens_total"),
                },
                "ops",
            ),
            Panel(
                "Where the time goes",
                "Mean time of each part of a request's life; decode is per instance that it has been on.",
                {"{{stage}}": mean("pd_serve_request_stage_seconds", "stage")},
                "s",
                stacked=True,
            ),
            Panel(
                "Dispatches",
                "Where requests begin.",
                {"{{instance}}": rate("pd_serve_dispatches_total", "instance")},
                "reqps",
                stacked=True,
            ),
            Panel(
                "Waiting",
                "In line at the API servers, queued on instances, and for a place to decode.",
                {
                    "in line": "sum(pd_serve_waiting_line_requests)",
                    "queued": "sum(max by (instance) (pd_serve_instance_waiting))",
                    "stranded": "sum(max by (instance) (pd_serve_instance_stranded))",
                },
            ),
            Panel(
                "Recomputed",
                "Requests whose instance has died.",
                {"recomputed": rate("pd_serve_recomputed_requests_total")},
                "reqps",
            ),
        ],
    },
)

INSTANCES = Dashboard(
    "instances",
    "pd-serve / Instances",
    {
        "Load": [
            Panel(
                "Freeness",
                "Free blocks per running request: what moves requests. Minus infinity while draining.",
                of_instances("freeness"),
            ),
            Panel(
                "KV blocks in use",
                "Of those that requests can use.",
                {
                    "{{instance}}": f"1 - max by (instance) (pd_serve_instance_free_blocks{{{OF_INSTANCE}}})"
                    f" / max by (instance) (pd_serve_instance_total_blocks{{{OF_INSTANCE}}})"
                },
                "percentunit",
            ),
            Panel(
                "Virtual usage",
                "Blocks used or claimed: by the head of the queue, by headroom of high priority.",
                of_instances("virtual_usage_blocks"),
            ),
            Panel("Batch", "Running requests.", of_instances("running")),
            Panel("Queue", "Requests that wait for the batch.", of_instances("waiting")),
            Panel("Prefill backlog", "Prompt tokens still to be computed.", of_instances("waiting_tokens")),
            Panel("Preempted", "Queued requests that have lost their blocks.", of_instances("preempted")),
            Panel(
                "Fragmentation",
                "Share of all blocks that are free, would do for queued requests, and help none of them.",
                {
                    "share": "max(pd_serve_fragmented_blocks)"
                    " / sum(max by (instance) (pd_serve_instance_total_blocks))"
                },
                "percentunit",
            ),
        ],
        "Engine": [
            Panel(
                "Generated tokens",
                "vLLM's count.",
                {"{{instance}}": rate(f"vllm:generation_tokens_total{{{OF_INSTANCE}}}", "instance")},
                "ops",
            ),
            Panel(
                "Prefix cache hits",
                "Share of looked-up tokens, as vLLM counts them.",
                {
                    "{{instance}}": rate(f"vllm:prefix_cache_hits_total{{{OF_INSTANCE}}}", "instance")
                    + " / "
                    + rate(f"vllm:prefix_cache_queries_total{{{OF_INSTANCE}}}", "instance")
                },
                "percentunit",
            ),
            Panel("CPU", "Cores used by the process.", rate_of_instances("cpu_seconds")),
            Panel("Memory", "Resident.", of_instances("resident_memory_bytes"), "bytes"),
        ],
    },
)

MIGRATIONS = Dashboard(
    "migrations",
    "pd-serve / Migrations",
    {
        "How many": [
            Panel(
                "Migrations",
                "Ended, by reason and outcome. Each request is handed off once; the rest is rescheduling.",
                {"{{reason}} {{outcome}}": rate("pd_serve_migrations_total", "reason, outcome")},
                "ops",
            ),
            Panel(
                "Under way",
                "Arriving at each instance.",
                of_instances("migrating_in"),
            ),
            Panel(
                "Offers refused",
                "By the instance that had no room.",
                rate_of_instances("refused_offers"),
                "ops",
            ),
            Panel(
                "Stranded",
                "Decoded by a prefill instance until another one takes them.",
                of_instances("stranded"),
            ),
        ],
        "What a client feels": [
            Panel(
                "Downtime",
                "From the last token of the source to the first of the destination.",
                quantiles("pd_serve_migration_downtime_seconds", 0.5, 0.99, by="reason"),
                "s",
            ),
            Panel(
                "Hand-off",
                "From the first token to the first one of the decode instance.",
                {
                    f"p{share * 100:g}": f"histogram_quantile({share}, sum by (le) "
                    f'(rate(pd_serve_request_stage_seconds_bucket{{stage="handoff"}}{RATE})))'
                    for share in (0.5, 0.9, 0.99)
                },
                "s",
            ),
        ],
        "What it takes": [
            Panel(
                "Duration",
                "From the offer to the end. The request goes on meanwhile.",
                quantiles("pd_serve_migration_duration_seconds", 0.5, 0.99, by="reason"),
                "s",
            ),
            Panel(
                "Stages",
                "Mean rounds of copying.",
                {"{{reason}}": mean("pd_serve_migration_stages", "reason")},
            ),
            Panel(
                "Time per stage",
                "live: the request decodes meanwhile; tail: it waits.",
                {"{{kind}}": mean("pd_serve_migration_stage_seconds", "kind")},
                "s",
            ),
            Panel(
                "Bytes",
                "KV copied, by reason.",
                {"{{reason}}": rate("pd_serve_migrated_bytes_total", "reason")},
                "Bps",
            ),
            Panel(
                "Blocks",
                "By reason.",
                {"{{reason}}": rate("pd_serve_migrated_blocks_total", "reason")},
                "ops",
            ),
            Panel(
                "Received",
                "By instance; what came of aborted migrations included.",
                rate_of_instances("received_bytes"),
                "Bps",
            ),
            Panel("Reserved", "Blocks held for arriving requests.", of_instances("reserved_blocks")),
            Panel("Suspended", "Requests whose tail is moving.", of_instances("suspended")),
        ],
    },
)

SCALING = Dashboard(
    "scaling",
    "pd-serve / Scaling",
    {
        "Pools": [
            Panel(
                "Instances",
                "That report, by role.",
                {"{{role}}": "count by (role) (max by (instance, role) (pd_serve_instance_info))"},
                stacked=True,
            ),
            Panel(
                "Draining",
                "Instances that take nothing new.",
                {"{{role}}": "sum by (role) (max by (instance, role) (pd_serve_instance_draining))"},
            ),
            Panel(
                "Free blocks per request",
                "Of each pool: what scaling goes by.",
                {
                    "{{role}}": "sum by (role) (max by (instance, role) (pd_serve_instance_free_blocks))"
                    " / clamp_min(sum by (role) (max by (instance, role) (pd_serve_instance_running)), 1)"
                },
            ),
            Panel(
                "In line",
                "Requests that no instance has yet.",
                {"{{api_server}}": "sum by (api_server) (pd_serve_waiting_line_requests)"},
            ),
        ],
        "Decisions": [
            Panel(
                "Decisions",
                "Of the scheduler about instances, in the last five minutes.",
                {"{{decision}}": "max by (decision) (increase(pd_serve_scheduler_decisions_total[5m]))"},
            ),
            Panel(
                "Carried out",
                "Instances started and stopped, in the last five minutes.",
                {
                    "{{action}} {{role}}": "max by (action, role) "
                    "(increase(pd_serve_scaled_instances_total[5m]))"
                },
            ),
            Panel(
                "Moves ordered",
                "By the scheduler, by reason.",
                {"{{reason}}": f"max by (reason) (rate(pd_serve_scheduler_moves_total{RATE}))"},
                "ops",
            ),
            Panel(
                "Scheduler",
                "Whether it reports, and how often it was started again.",
                {
                    "up": "max(pd_serve_scheduler_up)",
                    "restarts": "max(pd_serve_scheduler_restarts_total)",
                },
            ),
            Panel(
                "Scheduler's CPU",
                "Cores.",
                {"cores": f"max(rate(pd_serve_scheduler_cpu_seconds_total{RATE}))"},
            ),
        ],
    },
)

DASHBOARDS = [OVERVIEW, INSTANCES, MIGRATIONS, SCALING]


if __name__ == "__main__":
    for dashboard in DASHBOARDS:
        (FOLDER / f"{dashboard.name}.json").write_text(rendered(dashboard), encoding="utf-8")
