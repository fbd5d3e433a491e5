"""Whether a cluster is as it should be at rest, by the body of `GET /cluster`."""

from collections.abc import Mapping
from typing import Any


def missing_instances(cluster: Mapping[str, Any], sizes: Mapping[str, int]) -> list[str]:
    """What is not as at the beginning; empty when every pool has its wanted size and no instance drains."""
    rows = cluster.get("instances", ())
    problems = []
    for role, wanted in sizes.items():
        states = [row["state"] for row in rows if row["role"] == role]
        if states != ["ready"] * wanted:
            problems.append(f"{role}: {wanted} instances wanted, there are: {', '.join(states) or 'none'}")
    if (cluster.get("restart") or {}).get("running"):
        problems.append("a rolling restart does not end")
    return problems


def not_at_rest(cluster: Mapping[str, Any]) -> list[str]:
    """Requests and blocks that are held although no client waits."""
    problems = []
    for row in cluster.get("instances", ()):
        if row["running"] or row["waiting"]:
            problems.append(f"{row['id']}: {row['running']} running and {row['waiting']} waiting requests")
        if row["free_blocks"] != row["total_blocks"]:
            problems.append(f"{row['id']}: {row['total_blocks'] - row['free_blocks']} blocks are held")
    return problems
