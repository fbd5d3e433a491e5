"""What a simulated engine behind the real API makes of vLLM's requests."""

import asyncio
from typing import Any, get_type_hints

import msgspec
import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.metrics.stats import PrefillStats, PrefixCacheStats, SchedulerStats

from migration.engine_interface import EngineEvents
from migration.token_span import TokenSpan
from pd_serve.api.codec import VllmCodec
from pd_serve.comm.messages import RequestReport, TokenHeader
from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine import vllm_format
from pd_serve.simulated_engine.cost_model import LinearCostModel
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulated_engine.vllm_format import check_parameters, decode_request
from tests.virtual_time import in_virtual_time


def encoded(**fields: Any) -> list[bytes]:
    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=8),
        pooling_params=None,
        arrival_time=5.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        priority=-1,
    )
    for name, value in fields.items():
        setattr(request, name, value)
    return VllmCodec().encode_request(request)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        (SamplingParams(logprobs=0), "no logprobs"),
        (SamplingParams(prompt_logprobs=1), "no logprobs"),
        (SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True)), "follows no grammar"),
    ],
)
def test_parameters_that_need_a_model_are_refused(parameters: SamplingParams, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        check_parameters(parameters)


def test_sampling_and_stops_are_not_refused() -> None:
    check_parameters(SamplingParams(temperature=0.7, top_p=0.5, seed=3, stop=["x"], min_tokens=2))


def test_a_request_becomes_a_sequence() -> None:
    payload = encoded()
    sequence = decode_request(payload)

    assert (sequence.request_id, sequence.prompt_tokens, sequence.max_tokens) == ("r", 3, 8)
    assert (sequence.priority, sequence.rank, sequence.payload) == (-1, 5.0, payload)


@pytest.mark.parametrize("without", ["prompt_token_ids", "sampling_params"])
def test_only_tokens_can_be_simulated(without: str) -> None:
    with pytest.raises(InvalidRequestError, match="from tokens only"):
        decode_request(encoded(**{without: None}))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (vllm_format.VllmRequest, EngineCoreRequest),
        (vllm_format.VllmOutput, EngineCoreOutput),
        (vllm_format.VllmOutputs, EngineCoreOutputs),
    ],
)
def test_encoded_by_position_the_fields_are_the_first_of_vllm_s(ours: type, theirs: type) -> None:
    fields = [field.name for field in msgspec.structs.fields(ours)]
    assert fields == [field.name for field in msgspec.structs.fields(theirs)][: len(fields)]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (vllm_format.VllmParameters, SamplingParams),
        (vllm_format.VllmEvent, EngineCoreEvent),
        (vllm_format.VllmStats, SchedulerStats),
        (vllm_format.VllmCacheStats, PrefixCacheStats),
        (vllm_format.VllmPrefillStats, PrefillStats),
    ],
)
def test_encoded_by_name_the_fields_are_among_vllm_s(ours: type, theirs: type) -> None:
    assert {field.name for field in msgspec.structs.fields(ours)} <= get_type_hints(theirs).keys()


def test_the_defaults_and_values_are_vllm_s() -> None:
    assert vllm_format.VllmParameters().max_tokens == SamplingParams().max_tokens
    kinds = EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED
    assert kinds == (vllm_format.QUEUED, vllm_format.SCHEDULED)
    reasons = {None: None, "length": FinishReason.LENGTH, "error": FinishReason.ERROR}
    assert reasons == vllm_format.FINISH_REASONS


def test_vllm_decodes_the_outputs() -> None:
    events = [vllm_format.VllmEvent(vllm_format.SCHEDULED, 4.0)]
    batch = [
        vllm_format.VllmOutput("r", [7], finish_reason=1, events=events),
        vllm_format.VllmOutput("s", [8]),
    ]
    stats = vllm_format.VllmStats(1, 2, 0.5, vllm_format.VllmCacheStats())
    outputs = vllm_format.VllmOutputs(0, batch, stats, 5.0)
    header = msgspec.msgpack.encode(TokenHeader("p0", [(0, 0, 0), (0, 0, 0)]))

    _, decoded = VllmCodec().decode([header, msgspec.msgpack.encode(outputs)])

    first, second = decoded.outputs
    assert (first.request_id, first.new_token_ids, first.finish_reason) == ("r", [7], FinishReason.LENGTH)
    assert (second.new_token_ids, second.finish_reason) == ([8], None)
    assert first.events is not None
    assert decoded.timestamp - first.events[0].timestamp == pytest.approx(1.0)
    assert decoded.scheduler_stats is not None
    assert decoded.scheduler_stats.num_waiting_reqs == 2


@pytest.mark.parametrize(("caching", "hits"), [(True, 16), (False, 0)])
@in_virtual_time
async def test_tokens_of_prompts_and_cached_ones_are_reported_once(caching: bool, hits: int) -> None:
    """With the first token of each request, as vLLM's metrics count them."""
    batches: list[EngineCoreOutputs] = []

    def publish(client: str, payload: list[bytes], spans: list[TokenSpan]) -> None:
        header = msgspec.msgpack.encode(TokenHeader("p0", spans))
        batches.append(VllmCodec().decode([header, *payload])[1])

    events = EngineEvents(
        on_prefill_started=lambda ids: None,
        on_requests_ended=lambda ids: None,
        on_load=lambda load: None,
        on_death=lambda error: None,
    )
    cost = LinearCostModel((5.0, 1.0, 0.0), (10.0, 1.0, 0.0))
    engine = vllm_format.make_engine(
        EngineSettings(cost, num_blocks=32, block_tokens=4, prefix_caching=caching), publish, events
    )
    for number in range(2):
        await engine.add(encoded(request_id=f"r{number}", prompt_token_ids=list(range(20))), "api")
        await asyncio.sleep(1.0)

    prefills = [o.prefill_stats for batch in batches for o in batch.outputs if o.prefill_stats is not None]
    assert [
        (p.num_prompt_tokens, p.num_computed_tokens, p.num_cached_tokens, p.num_local_cached_tokens)
        for p in prefills
    ] == [(20, 20, 0, 0), (20, 20 - hits, hits, hits)]
    found = [b.scheduler_stats.prefix_cache_stats for b in batches if b.scheduler_stats is not None]
    counted = sum(f.requests for f in found), sum(f.queries for f in found), sum(f.hits for f in found)
    assert counted == ((2, 40, 16) if caching else (0, 0, 0))


def test_a_report_is_a_header_only() -> None:
    header = TokenHeader("p0", [], RequestReport(1, 2, []))
    decoded, batch = VllmCodec().decode([msgspec.msgpack.encode(header)])
    assert (decoded, batch.outputs) == (header, [])
