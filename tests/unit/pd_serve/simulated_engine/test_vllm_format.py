"""What a simulated engine behind the real API makes of vLLM's requests."""

from typing import Any

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest

from pd_serve.api.codec import VllmCodec
from pd_serve.errors import InvalidRequestError
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
