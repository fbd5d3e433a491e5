"""Workloads: lengths from a generator or a file, arrival times, priorities.

The same specification and seed give the same list of requests in every process.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from pd_serve.errors import InvalidRequestError
from pd_serve.simulation import trace_files
from pd_serve.simulation.arrivals import Arrivals, Seconds, drawn, recorded, recorded_rate
from pd_serve.simulation.config import TraceRequest
from pd_serve.simulation.lengths import generate, is_generated
from pd_serve.simulation.sessions import make_sessions, turns_of
from pd_serve.simulation.trace_files import RecordedTrace

HIGH_PRIORITY = -1
DEFAULT_REQUESTS = 10_000


@dataclass(frozen=True, slots=True)
class TraceSpec:
    """Specification of a workload.

    Attributes:
        name: Generated (`lengths.is_generated`), a known file (`trace_files.FILES`), or a path.
        rate: Mean requests/s; None for the rate of the file.
        requests: Number of requests; None for all of a file, or `DEFAULT_REQUESTS` generated ones.
        arrivals: See `Arrivals.parse`; None for recorded times if the trace has them, Poisson otherwise.
        priority_fraction: Share of requests with high priority, chosen at random.
        seed: Seed 0 gives the lengths of the paper.
    """

    name: str
    rate: float | None = None
    requests: int | None = None
    arrivals: str | None = None
    priority_fraction: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """Checks the numbers. Raises: InvalidRequestError: One is out of its range."""
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise InvalidRequestError(f"rate {self.rate}: must be above 0")
        if self.requests is not None and self.requests < 1:
            raise InvalidRequestError(f"{self.requests} requests: at least 1 is needed")
        if not 0 <= self.priority_fraction <= 1:
            raise InvalidRequestError(f"priority fraction {self.priority_fraction}: must be from 0 to 1")
        if not 0 <= self.seed < 2**31:
            raise InvalidRequestError(f"seed {self.seed}: must be from 0 to {2**31 - 1}")


def make_requests(spec: TraceSpec, folder: Path | None = None) -> list[TraceRequest]:
    """The requests of a workload, in the order of arrival.

    Args:
        folder: Folder of trace files; see `trace_files`.

    Raises:
        InvalidRequestError: The specification is invalid; the message has the reason.
    """
    spec.check()
    if turns := turns_of(spec.name):
        count = spec.requests or DEFAULT_REQUESTS
        return make_sessions(turns, count, spec.rate, spec.arrivals, spec.seed)
    trace = _trace(spec, folder)
    count = len(trace.prompts)
    # Separate random streams: the lengths of a seed stay the same when the arrivals change.
    times = _arrivals(spec, trace.arrivals, count, np.random.RandomState([spec.seed, 1]))
    dice = np.random.RandomState([spec.seed, 2])
    priorities = np.zeros(count, dtype=int)
    priorities[dice.permutation(count)[: round(count * spec.priority_fraction)]] = HIGH_PRIORITY
    columns = (column.tolist() for column in (times, trace.prompts, trace.outputs, priorities))
    requests = [TraceRequest(*row) for row in zip(*columns, trace.segments or [()] * count, strict=True)]
    return [requests[i] for i in np.argsort(times, kind="stable")]


def has_times(spec: TraceSpec, folder: Path | None = None) -> bool:
    """Whether a trace has arrival times of its own.

    Raises:
        InvalidRequestError: There is no such trace.
    """
    if is_generated(spec.name) or turns_of(spec.name):
        return False
    return trace_files.read(trace_files.find(spec.name, folder)).arrivals is not None


def fitting(requests: list[TraceRequest], most_tokens: int) -> list[TraceRequest]:
    """The requests with at most `most_tokens` prompt and output tokens.

    An instance with room for `most_tokens` can never serve the others. The turns of a session after one that
    does not fit are left out, too.
    """
    kept: list[TraceRequest] = []
    places: dict[int, int] = {}  # of the kept ones
    for number, request in enumerate(requests):
        before = request.turn_of
        if request.prompt_tokens + request.output_tokens > most_tokens or (
            before is not None and before not in places
        ):
            continue
        places[number] = len(kept)
        kept.append(request if before is None else replace(request, turn_of=places[before]))
    return kept


def _trace(spec: TraceSpec, folder: Path | None) -> RecordedTrace:
    if is_generated(spec.name):
        return RecordedTrace(*generate(spec.name.lower(), spec.requests or DEFAULT_REQUESTS, spec.seed))
    path = trace_files.find(spec.name, folder)
    file = trace_files.read(path)
    held, wanted = len(file.prompts), spec.requests or len(file.prompts)
    if file.arrivals is None:  # lengths only: the order means nothing, so take a random sample
        rows = np.random.RandomState(spec.seed).choice(held, wanted, replace=wanted > held)
        return RecordedTrace(file.prompts[rows], file.outputs[rows])
    if wanted > held:
        raise InvalidRequestError(f"{path.name} has {held} requests: {wanted} are too many")
    segments = file.segments[:wanted] if file.segments else None
    return RecordedTrace(file.prompts[:wanted], file.outputs[:wanted], file.arrivals[:wanted], segments)


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
