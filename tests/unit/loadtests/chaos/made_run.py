"""Streams, faults and samples as a run has them."""

from typing import Any

from loadtests.chaos.injector import FaultRecord, Hit
from loadtests.chaos.schedule import Fault, Operation, Target
from loadtests.checked_load import Pause, StreamRecord
from loadtests.outcome import Outcome


def stream(number: int = 0, error: str | None = None, end_s: float = 10.0, **given: Any) -> StreamRecord:
    outcome = Outcome(number, 40, 0.1, [0.1, 3.0], end_s, error=error)
    return StreamRecord(outcome, refusals=1, pauses=[Pause(2.0, 3.0)], **given)


def fault(
    target: Target = Target.DECODE,
    pid: int = 11,
    at_s: float = 5.0,
    freeze_s: float | None = None,
    during: Operation | None = None,
) -> FaultRecord:
    planned = Fault(0, 1.0, (target,), freeze_s, during, 0.0, 0)
    return FaultRecord(planned, at_s, at_s + (freeze_s or 0.0), [Hit(target, f"{target}-0", pid)])


def instance(role: str = "decode", **given: Any) -> dict[str, Any]:
    row = {"id": f"{role}-0", "role": role, "state": "ready", "pid": 11, "draining": False}
    return row | {"running": 0, "waiting": 0, "free_blocks": 100, "total_blocks": 100} | given


def cluster(*rows: dict[str, Any], **given: Any) -> dict[str, Any]:
    return {
        "instances": list(rows),
        "waiting_line": {"requests": 0},
        "migrations": {},
        "restart": None,
    } | given
