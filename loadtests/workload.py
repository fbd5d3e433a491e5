"""The requests of a load test and their start times, from a trace, a rate and a shape over time."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.workloads import TraceSpec, make_requests

Curve = NDArray[np.float64]

#: The rate over the mean rate, as a function of the run's time from 0 to 1. `warped` scales the mean to 1.
SHAPES: dict[str, Callable[[Curve], Curve]] = {
    "steady": np.ones_like,
    "ramp": lambda x: 0.2 + 1.6 * x,
    "spike": lambda x: np.where((x >= 0.45) & (x < 0.55), 5.0, 1.0),  # five-fold for a tenth of the time
    "day": lambda x: 1.0 - 0.8 * np.cos(2 * np.pi * x),  # one day, from midnight to midnight
}

_STEPS = 10_000


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of one user.

    Attributes:
        number: In the order of arrival, from 0.
        at_s: Start time, since the beginning of the load.
        api: "completions" or "chat".
        segments: See `TraceRequest.segments`.
    """

    number: int
    at_s: float
    api: str
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    segments: tuple[int, ...] = ()


def plan(
    spec: TraceSpec,
    *,
    api: str,
    shape: str = "steady",
    rate_scale: float = 1.0,
    max_tokens: int | None = None,
    max_prompt_tokens: int | None = None,
    until_s: float | None = None,
    folder: Path | None = None,
) -> list[PlannedRequest]:
    """The requests in the order of arrival. The same arguments and trace file give the same plan.

    Args:
        api: "completions", "chat", or "both" for a random choice per request.
        rate_scale: Factor on the request rate of `spec`.
        max_tokens: Longer answers are cut to this; `max_prompt_tokens` cuts prompts.
        until_s: Requests that start later are left out.
        folder: The folder of trace files.

    Raises:
        InvalidRequestError: The trace is missing or has no requests; the message says what to change.
    """
    requests = make_requests(spec, folder)
    times = warped(np.array([request.arrival_s for request in requests]) / rate_scale, shape)
    coin = random.Random(f"api {spec.seed}")
    planned: list[PlannedRequest] = []
    for request, at_s in zip(requests, times.tolist(), strict=True):
        chosen = coin.choice(("completions", "chat")) if api == "both" else api
        if until_s is None or at_s < until_s:
            prompt_tokens = min(request.prompt_tokens, max_prompt_tokens or request.prompt_tokens)
            tokens = min(request.output_tokens, max_tokens or request.output_tokens)
            planned.append(
                PlannedRequest(
                    len(planned), at_s, chosen, prompt_tokens, tokens, request.priority, request.segments
                )
            )
    if not planned:
        raise InvalidRequestError(f"trace {spec.name!r} has no requests in the first {until_s} s")
    return planned


def fitting(planned: list[PlannedRequest], most_tokens: int) -> list[PlannedRequest]:
    """The requests whose prompt and answer together fit into the model's context."""
    return [request for request in planned if request.prompt_tokens + request.output_tokens <= most_tokens]


def warped(times: Curve, shape: str) -> Curve:
    """Moves arrivals closer together where the shape is high, within the same total time.

    A time at a share u of the total becomes the time until which the shape has a share u of its area.
    """
    total = times[-1] if len(times) else 0.0
    if total <= 0:
        return times
    edges = np.linspace(0.0, 1.0, _STEPS + 1)
    heights = SHAPES[shape]((edges[1:] + edges[:-1]) / 2)
    area = np.concatenate([[0.0], np.cumsum(heights)]) / heights.sum()
    return np.asarray(np.interp(times / total, area, edges) * total)
