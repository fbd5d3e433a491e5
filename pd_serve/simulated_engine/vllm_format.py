"""A simulated engine behind the real API: it takes requests and sends outputs in vLLM's form, in real time.

For load tests and demonstrations without a GPU: everything but the model is real. The classes here have the
names and order of the fields that matter, so that an instance starts without vLLM, whose import takes 10 s
of CPU time and 300 MiB.

Source: vLLM 0.32, `vllm/v1/engine/__init__.py`, `vllm/sampling_params.py` and `vllm/v1/metrics/stats.py`.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

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

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


class VllmParameters(msgspec.Struct, omit_defaults=True):
    """Of vLLM's `SamplingParams`."""

    max_tokens: int | None = 16


class VllmRequest(msgspec.Struct, array_like=True):
    """The first fields of vLLM's `EngineCoreRequest`."""

    request_id: str
    prompt_token_ids: list[int] | None
    mm_features: Any
    sampling_params: VllmParameters | None
    pooling_params: Any
    arrival_time: float
    lora_request: Any
    cache_salt: Any
    data_parallel_rank: Any
    prompt_embeds: Any = None
    prompt_is_token_ids: Any = None
    client_index: int = 0
    current_wave: int = 0
    priority: int = 0


class VllmEvent(msgspec.Struct):
    """vLLM's `EngineCoreEvent`."""

    type: int
    timestamp: float


class VllmPrefillStats(msgspec.Struct):
    """Of vLLM's `PrefillStats`."""

    num_prompt_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    num_local_cached_tokens: int


class VllmOutput(msgspec.Struct, array_like=True, omit_defaults=True):
    """The first fields of vLLM's `EngineCoreOutput`."""

    request_id: str
    new_token_ids: list[int]
    new_logprobs: None = None
    new_prompt_logprobs_tensors: None = None
    pooling_output: None = None
    finish_reason: int | None = None
    stop_reason: None = None
    events: list[VllmEvent] | None = None
    kv_transfer_params: None = None
    ec_transfer_params: None = None
    trace_headers: None = None
    prefill_stats: VllmPrefillStats | None = None


class VllmCacheStats(msgspec.Struct):
    """Of vLLM's `PrefixCacheStats`: what the prefills since the last message found."""

    requests: int = 0
    queries: int = 0
    hits: int = 0


class VllmStats(msgspec.Struct):
    """Of vLLM's `SchedulerStats`."""

    num_running_reqs: int
    num_waiting_reqs: int
    kv_cache_usage: float
    prefix_cache_stats: VllmCacheStats


class VllmOutputs(msgspec.Struct, array_like=True):
    """The first fields of vLLM's `EngineCoreOutputs`."""

    engine_index: int
    outputs: list[VllmOutput]
    scheduler_stats: VllmStats | None
    timestamp: float


#: Values of vLLM's `EngineCoreEventType` and `FinishReason`.
QUEUED, SCHEDULED = 1, 2
FINISH_REASONS: dict[object, int | None] = {None: None, "length": 1, "error": 3}

_decoder = msgspec.msgpack.Decoder(VllmRequest)
_encoder = msgspec.msgpack.Encoder()


def check_parameters(parameters: "SamplingParams") -> None:
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
    request = _decoder.decode(payload[0])
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
    publish: Callable[[str, list[bytes], list[TokenSpan]], None],
    events: EngineEvents,
    faults: EngineFaults | None = None,
    keep_ended_s: float = 0.0,
) -> SimulatedEngine:
    """An engine on the running event loop whose outputs go to `publish` in vLLM's form."""

    def sink(client: str, outputs: list[SimulatedOutput], spans: list[TokenSpan]) -> None:
        now = time.monotonic()
        batch = [
            VllmOutput(
                o.request_id,
                o.new_token_ids,
                finish_reason=FINISH_REASONS[o.finish_reason],
                events=_events(o, now),
                prefill_stats=_prefill_stats(o),
            )
            for o in outputs
        ]
        publish(client, [_encoder.encode(VllmOutputs(0, batch, _stats(engine, outputs), now))], spans)

    engine = SimulatedEngine(settings, decode_request, sink, events, faults=faults, keep_ended_s=keep_ended_s)
    return engine


def _events(output: SimulatedOutput, now: float) -> list[VllmEvent] | None:
    """The events with which vLLM's engine reports the prefill's begin, sent with the first token."""
    if output.times is None:
        return None
    queue_s, prefill_s = output.times
    begun = now - prefill_s
    return [
        VllmEvent(QUEUED, begun - queue_s),
        VllmEvent(SCHEDULED, begun),
    ]


def _prefill_stats(output: SimulatedOutput) -> VllmPrefillStats | None:
    """The tokens of the prompt, which vLLM's front end counts, sent with the first token."""
    if output.prompt is None:
        return None
    tokens, cached = output.prompt
    return VllmPrefillStats(tokens, tokens - cached, cached, cached)


def _stats(engine: SimulatedEngine, outputs: list[SimulatedOutput]) -> VllmStats:
    """As vLLM's front end shows them on `/metrics`."""
    load, prefills = engine.load(), [o.prompt for o in outputs if o.prompt is not None]
    found = VllmCacheStats()
    if engine.settings.prefix_caching:
        found = VllmCacheStats(len(prefills), sum(p[0] for p in prefills), sum(p[1] for p in prefills))
    return VllmStats(
        num_running_reqs=load.running - load.suspended,
        num_waiting_reqs=load.waiting,
        kv_cache_usage=1.0 - load.free_blocks / load.total_blocks,
        prefix_cache_stats=found,
    )
