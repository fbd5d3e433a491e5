"""Workloads: lengths from a generator or a file, arrivals, priorities. The same specification and seed
give the same list of requests, in every process.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pd_serve.errors import InvalidRequestError
from pd_serve.simulation import trace_files
from pd_serve.simulation.arrivals import Arrivals, Seconds, drawn, recorded, recorded_rate
from pd_serve.simulation.config import TraceRequest
from pd_serve.simulation.lengths import GENERATED, generate
from pd_serve.simulation.trace_files import Recorded

HIGH_PRIORITY = -1
DEFAULT_REQUESTS = 10_000


@dataclass(frozen=True, slots=True)
class TraceSpec:
    """What a list of requests is made from.

    Attributes:
        name: Of a generator (`lengths.GENERATED`), of a known file (`trace_files.FILES`), or a path.
        rate: Mean requests/s; None for the rate that the file was recorded at.
        requests: How many; None for all of a file, or `DEFAULT_REQUESTS` generated ones.
        arrivals: See `Arrivals.parse`; None for recorded times where the trace has them, Poisson otherwise.
        priority_fraction: Share of the requests, chosen at random, that are of high priority.
        seed: 0 gives the paper's own lengths.
    """

    name: str
    rate: float | None = None
    requests: int | None = None
    arrivals: str | None = None
    priority_fraction: float = 0.0
    seed: int = 0


def make_requests(spec: TraceSpec, folder: Path | None = None) -> list[TraceRequest]:
    """The workload, in the order of arrival.

    Args:
        folder: Where trace files are; see `trace_files`.

    Raises:
        InvalidRequestError: Something of it cannot be; the message says what to change.
    """
    _check(spec)
    lengths = _lengths(spec, folder)
    count = len(lengths.prompts)
    # A stream of random numbers each, so that the lengths of a seed stay the same when arrivals change.
    times = _arrivals(spec, lengths.arrivals, count, np.random.RandomState([spec.seed, 1]))
    dice = np.random.RandomState([spec.seed, 2])
    high = np.zeros(count, dtype=bool)
    high[dice.permutation(count)[: round(count * spec.priority_fraction)]] = True
    segments = lengths.segments or [()] * count
    order = np.argsort(times, kind="stable")
    arrivals, prompts, outputs = times.tolist(), lengths.prompts.tolist(), lengths.outputs.tolist()
    priorities = np.where(high, HIGH_PRIORITY, 0).tolist()
    return [
        TraceRequest(arrivals[i], prompts[i], outputs[i], priorities[i], segments[i]) for i in order.tolist()
    ]


def fitting(requests: list[TraceRequest], most_tokens: int) -> list[TraceRequest]:
    """The requests whose prompt and output together have at most so many tokens.

    Others can never be served by an instance that has no more room.
    """
    return [r for r in requests if r.prompt_tokens + r.output_tokens <= most_tokens]


def _lengths(spec: TraceSpec, folder: Path | None) -> Recorded:
    if spec.name.lower() in GENERATED:
        return Recorded(*generate(spec.name.lower(), spec.requests or DEFAULT_REQUESTS, spec.seed))
    path = trace_files.find(spec.name, folder)
    file = trace_files.read(path)
    held, wanted = len(file.prompts), spec.requests or len(file.prompts)
    if file.arrivals is None:  # lengths only: any sample of them is as good as another
        rows = np.random.RandomState(spec.seed).choice(held, wanted, replace=wanted > held)
        return Recorded(file.prompts[rows], file.outputs[rows])
    if wanted > held:
        raise InvalidRequestError(f"{path.name} holds {held} requests: {wanted} are too many")
    return Recorded(
        file.prompts[:wanted],
        file.outputs[:wanted],
        file.arrivals[:wanted],
        file.segments[:wanted] if file.segments else None,
    )


def _arrivals(spec: TraceSpec, in_file: Seconds | None, count: int, dice: np.random.RandomState) -> Seconds:
    arrivals = Arrivals.parse(spec.arrivals or ("poisson" if in_file is None else "recorded"))
    if in_file is None:
        if arrivals.kind == "recorded":
            raise InvalidRequestError(f"trace {spec.name!r} has no recorded arrival times")
        if spec.rate is None:
            raise InvalidRequestError(f"trace {spec.name!r} has no arrival times: a rate is needed")
        return drawn(arrivals, spec.rate, count, dice)
    if arrivals.kind == "recorded":
        return recorded(in_file, spec.rate)
    return drawn(arrivals, spec.rate or recorded_rate(in_file), count, dice)


def _check(spec: TraceSpec) -> None:
    if spec.rate is not None and not 0 < spec.rate < float("inf"):
        raise InvalidRequestError(f"rate {spec.rate}: must be above 0")
    if spec.requests is not None and spec.requests < 1:
        raise InvalidRequestError(f"{spec.requests} requests: at least 1 is needed")
    if not 0 <= spec.priority_fraction <= 1:
        raise InvalidRequestError(f"priority fraction {spec.priority_fraction}: must be from 0 to 1")
    if not 0 <= spec.seed < 2**31:
        raise InvalidRequestError(f"seed {spec.seed}: must be from 0 to {2**31 - 1}")
