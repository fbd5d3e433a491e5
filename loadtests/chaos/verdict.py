"""Whether a run passed: lost, doubled and wrong tokens, failed requests, and what did not come back."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from loadtests.chaos.injector import FaultRecord
from loadtests.chaos.monitor import Death
from loadtests.chaos.schedule import Operation, Target
from loadtests.checked_load import StreamRecord
from loadtests.processes import ProcessKind

#: A connection breaks at most this long after the death of its API server: until the kernel, or HAProxy, has
#: closed it and the client has read so.
BREAK_S = 10.0

#: An operation or the end of a raylet explains the end of a process for this long.
CAUSE_S = 150.0

#: Operations that end instances, and the processes that nothing else but a fault may end.
_ENDING_INSTANCES = (Operation.DRAIN, Operation.SCALE, Operation.RESTART)
_WATCHED = (ProcessKind.INSTANCE, ProcessKind.API_SERVER, ProcessKind.MANAGER)


def excuse(
    streams: Sequence[StreamRecord], deaths: Sequence[Death], records: Sequence[FaultRecord] = ()
) -> None:
    """Excuses streams whose connection broke when an API server had just died: they may have been its own.

    A death is noticed later than it happens, on a busy machine by seconds: kills count from when they were
    sent.
    """
    killed = [death.at_s for death in deaths if death.kind is ProcessKind.API_SERVER]
    kills = [record for record in records if record.fault.freeze_s is None]
    killed += [one.at_s for one in kills if any(hit.target is Target.API_SERVER for hit in one.hits)]
    for stream in streams:
        stream.excused = stream.broken and any(-1.0 <= stream.end_s - at_s <= BREAK_S for at_s in killed)


def problems_of_streams(streams: Sequence[StreamRecord]) -> list[str]:
    """One line for each kind of failure."""
    kinds = Counter(
        stream.outcome.error for stream in streams if stream.outcome.error is not None and not stream.excused
    )
    return [f"{count} streams: {kind}" for kind, count in kinds.most_common()]


def problems_of_faults(planned: int, records: Sequence[FaultRecord]) -> list[str]:
    """Faults that were not carried out, because no process of their kind came back in time."""
    missing = Counter(str(target) for record in records for target in record.missing)
    problems = [f"{count} times there was no {target} to signal" for target, count in missing.items()]
    if len(records) < planned:
        problems.append(f"{len(records)} of {planned} faults were carried out")
    return problems


def unexplained_deaths(deaths: Sequence[Death], records: Sequence[FaultRecord]) -> list[str]:
    """Processes that ended although neither a fault nor an operation was the cause."""
    hit = {one.pid for record in records for one in record.hits}
    raylets = [r.at_s for r in records if Target.RAYLET in r.fault.targets]
    operations = [r.at_s for r in records if r.fault.during in _ENDING_INSTANCES]
    last_s = max((record.until_s for record in records), default=0.0)
    problems = []
    for death in deaths:
        causes = raylets + (operations if death.kind is ProcessKind.INSTANCE else [])
        explained = death.pid in hit or any(0 <= death.at_s - at_s <= CAUSE_S for at_s in causes)
        if death.kind in _WATCHED and not explained and death.at_s <= last_s:
            problems.append(f"a healthy {death.kind} (pid {death.pid}) ended at {death.at_s:.0f} s")
    return problems


def summary(streams: Sequence[StreamRecord], records: Sequence[FaultRecord]) -> dict[str, Any]:
    """Numbers of a run."""
    errors = Counter(s.outcome.error for s in streams if s.outcome.error is not None and not s.excused)
    pauses = [pause.length_s for stream in streams for pause in stream.pauses]
    return {
        "faults": len(records),
        "kills": sum(len(one.hits) for one in records if one.fault.freeze_s is None),
        "freezes": sum(len(one.hits) for one in records if one.fault.freeze_s is not None),
        "by_target": dict(Counter(str(hit.target) for one in records for hit in one.hits)),
        "streams": len(streams),
        "tokens": sum(stream.outcome.tokens for stream in streams),
        "failed": sum(errors.values()),
        "failures": dict(errors),
        "excused": sum(stream.excused for stream in streams),
        "refusals": sum(stream.refusals for stream in streams),
        "longest_pause_s": max(pauses, default=0.0),
    }
