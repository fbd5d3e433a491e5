"""The workload of a plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine.hardware import Hardware
from pd_serve.simulation.config import TraceRequest
from pd_serve.simulation.sessions import turns_of
from pd_serve.simulation.workloads import TraceSpec, fitting, has_times, make_requests

#: Requests of each run, if the trace has as many.
DEFAULT_REQUESTS = 2000


def planned_workload(
    spec: TraceSpec, hardware: Hardware, traces: Path | None = None
) -> tuple[list[TraceRequest], dict[str, Any]]:
    """The requests that fit an instance, and facts about them.

    Without a rate, generated requests arrive at one that only has to be stretched.

    Returns:
        The requests, and {"rate": requests/s or None, "requests", "left_out", "mean_prompt_tokens",
        "mean_output_tokens"}.

    Raises:
        InvalidRequestError: The specification is invalid, or no request fits.
    """
    if turns_of(spec.name):
        raise InvalidRequestError("a plan has no sessions: its layouts do not keep prefixes")
    recorded = has_times(spec, traces)
    own_rate = recorded or spec.rate is not None
    if not recorded:
        rate = 1.0 if spec.rate is None else spec.rate
        spec = replace(spec, rate=rate, requests=spec.requests or DEFAULT_REQUESTS)
    wanted = make_requests(spec, traces)
    wanted = wanted[: spec.requests or DEFAULT_REQUESTS]
    engine = hardware.engine
    workload = fitting(wanted, int(engine.num_blocks * (1 - engine.watermark)) * engine.block_tokens)
    if len(workload) < 2 or workload[-1].arrival_s <= workload[0].arrival_s:
        raise InvalidRequestError(
            f"trace {spec.name!r}: {len(workload)} of {len(wanted)} requests fit an instance; a plan needs"
            " several that arrive one after the other"
        )
    span = workload[-1].arrival_s - workload[0].arrival_s
    return workload, {
        "rate": (len(workload) - 1) / span if own_rate else None,
        "requests": len(workload),
        "left_out": len(wanted) - len(workload),
        "mean_prompt_tokens": float(np.mean([request.prompt_tokens for request in workload])),
        "mean_output_tokens": float(np.mean([request.output_tokens for request in workload])),
    }
