"""Answers of `GET /cluster`, taken once a second, as series over time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ClusterSample:
    """One answer of `GET /cluster`.

    Attributes:
        at_s: Time since the load began; negative before.
        cluster: The body.
    """

    at_s: float
    cluster: dict[str, Any]

    @property
    def instances(self) -> list[dict[str, Any]]:
        instances: list[dict[str, Any]] = self.cluster["instances"]
        return instances


@dataclass(frozen=True, slots=True)
class InstancePeriod:
    """A time in which an instance kept one state: "ready", "draining", or "starting" in any way."""

    instance: str
    state: str
    begin_s: float
    end_s: float


def periods(samples: Sequence[ClusterSample]) -> list[InstancePeriod]:
    """The states of all instances, in the order in which instances appeared."""
    found: dict[str, list[InstancePeriod]] = {name: [] for name in names(samples)}
    for sample, following in zip(samples, [*samples[1:], samples[-1]], strict=True):
        for row in sample.instances:
            own = found[row["id"]]
            state = row["state"] if row["state"] in ("ready", "draining") else "starting"
            last = own[-1] if own and own[-1].end_s == sample.at_s else None
            begin_s = sample.at_s
            if last is not None and last.state == state:
                begin_s = own.pop().begin_s
            own.append(InstancePeriod(row["id"], state, begin_s, following.at_s))
    return [period for name in found for period in found[name]]


def names(samples: Sequence[ClusterSample]) -> list[str]:
    """Names of all instances, in the order in which they appeared."""
    return list(dict.fromkeys(row["id"] for sample in samples for row in sample.instances))


def used_share(samples: Iterable[ClusterSample], instance: str) -> tuple[list[float], list[float]]:
    """(times, share of its KV blocks in use) for the samples in which the instance had blocks."""
    points = [
        (sample.at_s, 1 - row["free_blocks"] / row["total_blocks"])
        for sample in samples
        for row in sample.instances
        if row["id"] == instance and row["total_blocks"]
    ]
    return [at for at, _ in points], [share for _, share in points]


def totals(samples: Iterable[ClusterSample], field: str) -> list[float]:
    """`running` or `waiting` requests of all instances; `waiting` includes the API server's waiting line."""
    return [
        sum(row[field] for row in sample.instances)
        + (sample.cluster["waiting_line"]["requests"] if field == "waiting" else 0)
        for sample in samples
    ]


def migrations(samples: Sequence[ClusterSample], outcome: str) -> dict[str, list[int]]:
    """Cumulative number of migrations at each sample, by reason.

    Args:
        outcome: "committed" or "aborted".
    """
    reasons = dict.fromkeys(reason for sample in samples for reason in sample.cluster["migrations"])
    return {
        reason: [sample.cluster["migrations"].get(reason, {}).get(outcome, 0) for sample in samples]
        for reason in reasons
    }


def decisions(samples: Iterable[ClusterSample]) -> list[tuple[float, str]]:
    """(time, text) of each decision of the scheduler, oldest first."""
    found: dict[tuple[str, int], float] = {}
    for sample in samples:
        for decision in sample.cluster["decisions"]:
            at_s = sample.at_s - decision["seconds_ago"]
            # Later samples list the same decision again, at a time that differs by rounding.
            near = (key for key in ((decision["what"], round(at_s) + d) for d in (-1, 0, 1)) if key in found)
            if next(near, None) is None:
                found[decision["what"], round(at_s)] = at_s
    return sorted((at_s, what) for (what, _), at_s in found.items())


def line(sample: ClusterSample) -> str:
    """A sample as one line of progress."""
    states = [
        f"{row['id']}{'' if row['state'] == 'ready' else ' ' + row['state']}" for row in sample.instances
    ]
    moved = sum(counts["committed"] for counts in sample.cluster["migrations"].values())
    running, waiting = (int(totals([sample], what)[0]) for what in ("running", "waiting"))
    return f"{sample.at_s:4.0f} s  {running:3} running {waiting:3} waiting {moved:4} moved  " + ", ".join(
        states
    )
