"""A simulated engine behind the real API: it takes requests and sends outputs in vLLM's form, in real time.

For load tests and demonstrations without a GPU: everything but the model is real.
"""

import time
from collections.abc import Callable
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder

from migration.engine_interface import EngineEvents
from migration.messages import RequestId
from migration.token_span import TokenSpan
from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine.contents import TokenPrompt
from pd_serve.simulated_engine.faults import EngineFaults
from pd_serve.simulated_engine.outputs import SimulatedOutput
from pd_serve.simulated_engine.sequence import Sequence
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulated_engine.simulated_engine import SimulatedEngine

_FINISH: dict[object, FinishReason | None] = {
    None: None,
    "length": FinishReason.LENGTH,
    "error": FinishReason.ERROR,
}

_decoder = MsgpackDecoder(EngineCoreRequest)


def check_parameters(parameters: SamplingParams) -> None:
    """Checks a request in the API server, so that its client gets the error before anything has begun.

    Raises:
        InvalidRequestError: They ask for what needs a model, logprobs or a grammar.
    """
    if parameters.logprobs is not None or parameters.prompt_logprobs is not None:
        raise InvalidRequestError("a simulated engine has no logprobs")
    if parameters.structured_outputs is not None:
        raise InvalidRequestError("a simulated engine follows no grammar")


def decode_request(payload: list[bytes]) -> Sequence:
    """Decodes a request of vLLM's. The simulated engine generates until `max_tokens`.

    Raises:
        InvalidRequestError: It is not about tokens.
    """
    request: EngineCoreRequest = _decoder.decode(payload)
    parameters = request.sampling_params
    if parameters is None or request.prompt_token_ids is None:
        raise InvalidRequestError("a simulated engine generates from tokens only")
    return Sequence(
        RequestId(request.request_id),
        TokenPrompt(request.prompt_token_ids),
        parameters.max_tokens or 1,
        request.priority,
        request.arrival_time,
        payload,
    )


def make_engine(
    settings: EngineSettings,
    publish: Callable[[str, Any, list[TokenSpan]], None],
    events: EngineEvents,
    faults: EngineFaults | None = None,
    keep_ended_s: float = 0.0,
) -> SimulatedEngine:
    """An engine on the running event loop whose outputs go to `publish` in vLLM's form."""

    def sink(client: str, outputs: list[SimulatedOutput], spans: list[TokenSpan]) -> None:
        now = time.monotonic()
        batch = [
            EngineCoreOutput(
                o.request_id, o.new_token_ids, finish_reason=_FINISH[o.finish_reason], events=_events(o, now)
            )
            for o in outputs
        ]
        stats = _stats(engine)
        publish(client, EngineCoreOutputs(outputs=batch, scheduler_stats=stats, timestamp=now), spans)

    engine = SimulatedEngine(settings, decode_request, sink, events, faults=faults, keep_ended_s=keep_ended_s)
    return engine


def _events(output: SimulatedOutput, now: float) -> list[EngineCoreEvent] | None:
    """The events with which vLLM's engine reports the prefill's begin, sent with the first token."""
    if output.times is None:
        return None
    queue_s, prefill_s = output.times
    begun = now - prefill_s
    return [
        EngineCoreEvent(EngineCoreEventType.QUEUED, begun - queue_s),
        EngineCoreEvent(EngineCoreEventType.SCHEDULED, begun),
    ]


def _stats(engine: SimulatedEngine) -> SchedulerStats:
    """As vLLM's front end shows them on `/metrics`."""
    load = engine.load()
    return SchedulerStats(
        num_running_reqs=load.running - load.suspended,
        num_waiting_reqs=load.waiting,
        kv_cache_usage=1.0 - load.free_blocks / load.total_blocks,
    )
