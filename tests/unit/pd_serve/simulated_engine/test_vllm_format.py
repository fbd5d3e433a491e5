"""What a simulated engine behind the real API makes of vLLM's requests."""

from typing import Any

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
from vllm.v1.metrics.stats import SchedulerStats

from pd_serve.api.codec import VllmCodec
from pd_serve.comm.messages import RequestReport, TokenHeader
from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine import vllm_format
from pd_serve.simulated_engine.vllm_format import check_parameters, decode_request


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
    ],
)
def test_encoded_by_name_the_fields_are_among_vllm_s(ours: type, theirs: type) -> None:
    assert {field.name for field in msgspec.structs.fields(ours)} <= set(theirs.__annotations__)


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
    outputs = vllm_format.VllmOutputs(0, batch, vllm_format.VllmStats(1, 2, 0.5), 5.0)
    header = msgspec.msgpack.encode(TokenHeader("p0", [(0, 0, 0), (0, 0, 0)]))

    _, decoded = VllmCodec().decode([header, msgspec.msgpack.encode(outputs)])

    first, second = decoded.outputs
    assert (first.request_id, first.new_token_ids, first.finish_reason) == ("r", [7], FinishReason.LENGTH)
    assert (second.new_token_ids, second.finish_reason) == ([8], None)
    assert first.events is not None
    assert decoded.timestamp - first.events[0].timestamp == pytest.approx(1.0)
    assert decoded.scheduler_stats is not None
    assert decoded.scheduler_stats.num_waiting_reqs == 2


def test_a_report_is_a_header_only() -> None:
    header = TokenHeader("p0", [], RequestReport(1, 2, []))
    decoded, batch = VllmCodec().decode([msgspec.msgpack.encode(header)])
    assert (decoded, batch.outputs) == (header, [])
