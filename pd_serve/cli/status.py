"""`pd-serve status`: the cluster, or the stages of a request, as tables."""

from typing import Any

import rich.console
from rich.table import Table

from pd_serve.cli.service_client import ServiceClient


def show_request(service: ServiceClient, request_id: str) -> None:
    """Prints `GET /cluster/requests/{id}`. Raises: PdServeError: as `show`, or no such request."""
    console = _console()
    for request in service.get(f"requests/{request_id}")["requests"]:
        console.print(
            f"{request['id']} ({request['name']}): {request['outcome'] or _where(request)},"
            f" {request['prompt_tokens']} + {request['output_tokens']} tokens,"
            f" first one after {_seconds(request['ttft_s'])},"
            f" longest gap {_seconds(request['longest_gap_s'])}"
        )
        stages = Table("stage", "instance", "from", "to")
        for s in request["stages"]:
            stages.add_row(s["stage"], s["instance"], _seconds(s["begin_s"]), _seconds(s["end_s"]))
        console.print(stages)
        migrations = Table("migration", "way", "outcome", "from", "to", "stages", "blocks", "downtime")
        for m in request["migrations"]:
            migrations.add_row(
                m["reason"],
                f"{m['source']} -> {m['destination']}",
                m["why"] or m["outcome"],
                _seconds(m["begin_s"]),
                _seconds(m["end_s"]),
                str(len(m["stages"])),
                str(m["blocks"]),
                _seconds(m["downtime_s"]),
            )
        console.print(migrations)


def show(service: ServiceClient) -> None:
    """Prints `GET /cluster`. Raises: PdServeError: no service there, or a wrong key."""
    cluster = service.get()
    console = _console()
    instances = Table(title="instances")
    columns = (
        "id",
        "role",
        "state",
        "node",
        "pid",
        "blocks free/total",
        "running",
        "waiting",
        "freeness",
        "in/out",
    )
    for column in columns:
        # In a narrow terminal, other columns are cut before the ones that are copied into commands.
        instances.add_column(column, no_wrap=column in ("id", "state", "pid"))
    for i in cluster["instances"]:
        instances.add_row(
            i["id"],
            i["role"],
            "empty" if i["draining"] and _is_empty(i) else i["state"],
            i["node"],
            str(i["pid"] or ""),
            f"{i['free_blocks']}/{i['total_blocks']}",
            str(i["running"]),
            str(i["waiting"]),
            "-inf" if i["freeness"] is None else f"{i['freeness']:.1f}",
            f"{i['migrating_in']}/{i['migrating_out']}",
        )
    console.print(instances)
    for i in cluster["instances"]:
        if (why := i.get("no_migration")) is not None:
            console.print(f"{i['id']} serves without migration: {why}", style="yellow", highlight=False)
        for reason, number in i.get("unmovable", {}).items():
            text = f"{i['id']}: {number} requests stay there until they end: {reason}"
            console.print(text, style="yellow", highlight=False)
    for server in cluster["api_servers"]:
        console.print(f"{server['id']}: pid {server['pid']}, {server['requests']} requests", highlight=False)
    line = cluster["waiting_line"]
    console.print(f"{line['requests']} requests in line for an instance with room, {line['tokens']} tokens")
    if (targets := cluster.get("targets", {})).get("requests"):
        console.print(
            f"{100 * targets['attainment']:.1f} % of {targets['requests']} requests with targets have met"
            f" them in the last minute, {targets['goodput']:.2f}/s",
            highlight=False,
        )
    migrations = Table("reason", "committed", "aborted", title="migrations")
    for reason, counts in cluster["migrations"].items():
        migrations.add_row(reason, str(counts["committed"]), str(counts["aborted"]))
    console.print(migrations)
    if scheduler := cluster["scheduler"]:
        console.print(
            f"scheduler: {scheduler['state']}, policy {scheduler['policy']}, {scheduler['restarts']} restarts"
        )
    for decision in cluster["decisions"]:
        console.print(f"{decision['seconds_ago']:8.0f} s ago  {decision['what']}", highlight=False)


def _console() -> rich.console.Console:
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 200  # a script gets whole lines
    return console


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f} s"


def _where(request: dict[str, Any]) -> str:
    """State of a running request, and where it is."""
    if (instance := request["instance"]) is not None:
        return f"{request['state']} on {instance}"
    return f"{request['state']} for an instance"


def _is_empty(instance: dict[str, Any]) -> bool:
    return not any(instance[count] for count in ("running", "waiting", "migrating_in", "migrating_out"))
