"""Which request starts when: a trace, its rate, and the shape of the load over the run."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.config import TraceRequest
from pd_serve.simulation.workloads import TraceSpec, make_requests

Curve = NDArray[np.float64]

#: How many times the mean rate there is, over the run from 0 to 1. `warped` brings the mean to 1.
SHAPES: dict[str, Callable[[Curve], Curve]] = {
    "steady": np.ones_like,
    "ramp": lambda x: 0.2 + 1.6 * x,
    "spike": lambda x: np.where((x >= 0.45) & (x < 0.55), 5.0, 1.0),  # a tenth of the time, five-fold
    "day": lambda x: 1.0 - 0.8 * np.cos(2 * np.pi * x),  # from night to night
}

_STEPS = 10_000


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One user's request.

    Attributes:
        number: In the order of arrival, from 0 on.
        at_s: Since the beginning of the load.
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
    """The requests in the order of arrival: a function of the arguments (and of the trace's file).

    Args:
        api: "completions", "chat", or "both" for each by a coin.
        rate_scale: Times as many requests/s as `spec` says.
        max_tokens: Longer answers are cut to this; `max_prompt_tokens` the same of prompts.
        until_s: Leave out what would start later.
        folder: Where trace files are.

    Raises:
        InvalidRequestError: The trace cannot be had or has no requests; the message says what to change.
    """
    requests = make_requests(spec, folder)
    times = warped(np.array([request.arrival_s for request in requests]) / rate_scale, shape)
    coin = random.Random(f"api {spec.seed}")
    planned: list[PlannedRequest] = []
    for request, at_s in zip(requests, times.tolist(), strict=True):
        chosen = coin.choice(("completions", "chat")) if api == "both" else api
        if until_s is None or at_s < until_s:
            planned.append(_planned(len(planned), at_s, chosen, request, max_tokens, max_prompt_tokens))
    if not planned:
        raise InvalidRequestError(f"trace {spec.name!r} has no requests in the first {until_s} s")
    return planned


def fitting(planned: list[PlannedRequest], most_tokens: int) -> list[PlannedRequest]:
    """Those whose prompt and answer together the model can hold."""
    return [request for request in planned if request.prompt_tokens + request.output_tokens <= most_tokens]


def warped(times: Curve, shape: str) -> Curve:
    """The same arrivals in the same total time, closer together where the shape is high.

    A time that was a share u of the whole becomes the one until which the shape has a share u of its area.
    """
    total = times[-1] if len(times) else 0.0
    if total <= 0:
        return times
    edges = np.linspace(0.0, 1.0, _STEPS + 1)
    heights = SHAPES[shape]((edges[1:] + edges[:-1]) / 2)
    area = np.concatenate([[0.0], np.cumsum(heights)]) / heights.sum()
    return np.asarray(np.interp(times / total, area, edges) * total)


def _planned(
    number: int,
    at_s: float,
    api: str,
    request: TraceRequest,
    max_tokens: int | None,
    max_prompt_tokens: int | None,
) -> PlannedRequest:
    prompt_tokens = min(request.prompt_tokens, max_prompt_tokens or request.prompt_tokens)
    output_tokens = min(request.output_tokens, max_tokens or request.output_tokens)
    return PlannedRequest(number, at_s, api, prompt_tokens, output_tokens, request.priority, request.segments)
