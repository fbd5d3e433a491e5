"""What `GET /cluster` said once a second, as series over time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """Attributes:
    at_s: Since the load began; negative before.
    cluster: Body of `GET /cluster`.
    """

    at_s: float
    cluster: dict[str, Any]

    @property
    def instances(self) -> list[dict[str, Any]]:
        instances: list[dict[str, Any]] = self.cluster["instances"]
        return instances


@dataclass(frozen=True, slots=True)
class Period:
    """An instance was in one state."""

    instance: str
    role: str
    state: str
    begin_s: float
    end_s: float


def periods(samples: Sequence[Sample]) -> list[Period]:
    """The states of all instances, in the order in which instances appeared."""
    found: dict[str, list[Period]] = {}
    for sample, following in zip(samples, [*samples[1:], samples[-1]], strict=True):
        for row in sample.instances:
            mine = found.setdefault(row["id"], [])
            now = Period(row["id"], row["role"], row["state"], sample.at_s, following.at_s)
            if mine and (mine[-1].state, mine[-1].role, mine[-1].end_s) == (now.state, now.role, now.begin_s):
                now = Period(now.instance, now.role, now.state, mine.pop().begin_s, now.end_s)
            mine.append(now)
    return [period for name in found for period in found[name]]


def names(samples: Sequence[Sample]) -> list[str]:
    """Of all instances there ever were, in the order in which they appeared."""
    return list(dict.fromkeys(row["id"] for sample in samples for row in sample.instances))


def used_share(samples: Iterable[Sample], instance: str) -> tuple[list[float], list[float]]:
    """(times, share of its KV blocks in use) while the instance had any."""
    points = [
        (sample.at_s, 1 - row["free_blocks"] / row["total_blocks"])
        for sample in samples
        for row in sample.instances
        if row["id"] == instance and row["total_blocks"]
    ]
    return [at for at, _ in points], [share for _, share in points]


def totals(samples: Iterable[Sample], what: str) -> list[float]:
    """`running` or `waiting`, over all instances. Who waits in line is in no instance's `waiting` yet."""
    return [
        sum(row[what] for row in sample.instances)
        + (sample.cluster["waiting_line"]["requests"] if what == "waiting" else 0)
        for sample in samples
    ]


def migrations(samples: Sequence[Sample], outcome: str) -> dict[str, list[int]]:
    """How many there had been, by reason.

    Args:
        outcome: "committed" or "aborted".
    """
    reasons = dict.fromkeys(reason for sample in samples for reason in sample.cluster["migrations"])
    return {
        reason: [sample.cluster["migrations"].get(reason, {}).get(outcome, 0) for sample in samples]
        for reason in reasons
    }


def decisions(samples: Iterable[Sample]) -> list[tuple[float, str]]:
    """(time, what and why) of each decision of the scheduler, oldest first."""
    found: dict[tuple[str, int], float] = {}
    for sample in samples:
        for decision in sample.cluster["decisions"]:
            at_s = sample.at_s - decision["seconds_ago"]
            # The same one is seen in every later sample, at times that differ by a rounding.
            near = (key for key in ((decision["what"], round(at_s) + d) for d in (-1, 0, 1)) if key in found)
            if next(near, None) is None:
                found[decision["what"], round(at_s)] = at_s
    return sorted((at_s, what) for (what, _), at_s in found.items())


def line(sample: Sample) -> str:
    """One line of progress."""
    states = [
        f"{row['id']}{'' if row['state'] == 'ready' else ' ' + row['state']}" for row in sample.instances
    ]
    moved = sum(counts["committed"] for counts in sample.cluster["migrations"].values())
    running, waiting = (int(totals([sample], what)[0]) for what in ("running", "waiting"))
    return f"{sample.at_s:4.0f} s  {running:3} running {waiting:3} waiting {moved:4} moved  " + ", ".join(
        states
    )
