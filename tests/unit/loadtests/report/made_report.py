"""Samples of a cluster and the numbers of a load, made by hand."""

from typing import Any

from loadtests.options import Limit
from loadtests.outcome import Outcome, as_row, summarize
from loadtests.report.cluster_samples import ClusterSample


def row(name: str, state: str = "ready", free: int = 75) -> dict[str, Any]:
    role = name.partition("-")[0]
    return {
        "id": name,
        "role": role,
        "state": state,
        "total_blocks": 0 if state == "starting" else 100,
        "free_blocks": free,
        "running": 2,
        "waiting": 1,
    }


def sample(at_s: float, rows: list[dict[str, Any]], moved: int = 0) -> ClusterSample:
    reasons = {"handoff": {"committed": moved, "aborted": 1}, "manual": {"committed": 0, "aborted": 0}}
    decisions = (
        [{"seconds_ago": round(at_s - 0.6, 1), "what": "decode-1 is started: because"}] if at_s > 0.6 else []
    )
    cluster = {
        "instances": rows,
        "waiting_line": {"requests": 4, "tokens": 9},
        "migrations": reasons,
        "decisions": decisions,
    }
    return ClusterSample(at_s, cluster)


SAMPLES = [
    sample(0.0, [row("decode-0")]),
    sample(1.0, [row("decode-0", free=50), row("decode-1", "starting")], 3),
    sample(2.0, [row("decode-0", "draining"), row("decode-1", "starting")], 7),
    sample(3.1, [row("decode-1")], 8),
]


def load_result() -> dict[str, Any]:
    outcomes = [
        Outcome(n, 20, 0.1 * (n + 1), [0.02] * 19, 1.0, "chat", at_s=n * 0.1, prompt_tokens=9)
        for n in range(20)
    ]
    failed = Outcome(20, 0, None, [], 0.1, "chat", at_s=2.0, prompt_tokens=9, error="HTTP 503", detail="full")
    outcomes.append(failed)
    return {
        "at": "today",
        "commit": None,
        "machine": {"cores": 2, "cpu": "<fast>"},
        "check": "simulated",
        "summary": summarize(outcomes, [Limit("ttft", 1.0)], 21),
        "requests": [as_row(one) for one in outcomes],
    }
