"""Requests and outputs as they travel."""

import time

import msgspec
import pytest
from vllm import SamplingParams
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, LoRARequestStates, RequestStateStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from pd_serve.api.codec import VllmCodec, arriving_now
from pd_serve.comm.messages import TokenHeader
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


def test_a_request_whose_turn_has_come_arrives_then_and_is_the_same_otherwise() -> None:
    sent = request(100)
    there = MsgpackDecoder(EngineCoreRequest).decode(
        arriving_now(VllmCodec().encode_request(sent), lambda: 7.5)
    )

    assert (there.arrival_time, there.prompt_token_ids) == (7.5, sent.prompt_token_ids)
    assert (there.request_id, there.sampling_params) == ("r", sent.sampling_params)


def test_a_request_that_no_socket_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be lost on the way, and its client wait for ever."""
    monkeypatch.setattr("pd_serve.api.codec.MAX_FRAME_BYTES", 1000)

    with pytest.raises(InvalidRequestError, match="takes more than 1000 bytes"):
        VllmCodec().encode_request(request(300))


def test_a_request_with_a_value_that_no_message_can_have_is_refused() -> None:
    nested: list[object] = []
    for _ in range(10_000):
        nested = [nested]
    for parameters in (
        SamplingParams(stop=["\ud800"], detokenize=True),
        SamplingParams(top_k=10**30),
        SamplingParams(extra_args={"kv_transfer_params": {"remote": nested}}),
    ):
        sent = request(3)
        sent.sampling_params = parameters
        with pytest.raises(InvalidRequestError, match="A value of the request cannot be sent"):
            VllmCodec().encode_request(sent)


HOURS_S = 3600.0


class Instance:
    """Sends one token at a time of the request "r", with the times of its machine's clock."""

    def __init__(self, clock_ahead_s: float) -> None:
        self._ahead_s = clock_ahead_s

    def frames(
        self, events: dict[EngineCoreEventType, float] | None = None, reason: FinishReason | None = None
    ) -> list[bytes]:
        """Args: `events` have their age in seconds."""
        now = time.monotonic() + self._ahead_s
        told = [EngineCoreEvent(kind, now - age_s) for kind, age_s in (events or {}).items()]
        output = EngineCoreOutput("r", [1], finish_reason=reason, events=told or None)
        outputs = EngineCoreOutputs(outputs=[output], timestamp=now)
        header = msgspec.msgpack.encode(TokenHeader("decode-0", [(0, 0, 0)]))
        return [header, *(bytes(frame) for frame in MsgpackEncoder().encode(outputs))]


def finished(messages: list[list[bytes]]) -> tuple[list[float], FinishedRequestStats]:
    """Inter-token latencies and the statistics of a request, as vLLM counts them from its messages."""
    codec, state, latencies = VllmCodec(), RequestStateStats(arrival_time=time.time()), []
    for number, frames in enumerate(messages):
        _, batch = codec.decode(frames)
        stats = IterationStats()
        stats.update_from_output(
            batch.outputs[0], batch.timestamp, number == 0, state, LoRARequestStates(), None
        )
        latencies += stats.inter_token_latencies_iter
    stats.update_from_finished_request(FinishReason.LENGTH, "r", 10, None, state)
    return latencies, stats.finished_requests[0]


@pytest.mark.parametrize("ahead_s", [7 * HOURS_S, -7 * HOURS_S])
def test_latencies_of_a_request_do_not_depend_on_the_clocks_of_its_instances(ahead_s: float) -> None:
    begun = {EngineCoreEventType.QUEUED: 3.0, EngineCoreEventType.SCHEDULED: 2.0}
    source, destination = Instance(ahead_s), Instance(-2 * ahead_s)
    latencies, stats = finished(
        [
            source.frames(begun),
            source.frames(),
            destination.frames({EngineCoreEventType.SCHEDULED: 0.5}),
            destination.frames(reason=FinishReason.LENGTH),
        ]
    )

    assert all(0 <= latency < HOURS_S for latency in latencies)
    assert stats.queued_time == pytest.approx(1.0)
    assert 1.9 < stats.prefill_time < HOURS_S
    assert 0 <= stats.decode_time < HOURS_S
    assert 1.9 < stats.inference_time < HOURS_S


def test_the_duration_of_a_prefill_is_that_of_its_instance() -> None:
    frames = Instance(7 * HOURS_S).frames({EngineCoreEventType.SCHEDULED: 2.5})
    codec = VllmCodec()
    _, batch = codec.decode(frames)

    assert codec.prefill_s(batch, batch.outputs[0]) == pytest.approx(2.5)
