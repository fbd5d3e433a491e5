"""Requests as they travel."""

import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder

from pd_serve.api.codec import VllmCodec
from pd_serve.errors import InvalidRequestError


def request(prompt_tokens: int) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[70_000] * prompt_tokens,
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=8),
        pooling_params=None,
        arrival_time=1.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def test_a_request_arrives_as_it_was() -> None:
    there = MsgpackDecoder(EngineCoreRequest).decode(VllmCodec().encode_request(request(100)))

    assert there.prompt_token_ids == [70_000] * 100


def test_a_request_that_no_socket_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be lost on the way, and its client wait for ever."""
    monkeypatch.setattr("pd_serve.api.codec.MAX_FRAME_BYTES", 1000)

    with pytest.raises(InvalidRequestError, match="takes more than 1000 bytes"):
        VllmCodec().encode_request(request(300))
