"""A simulated engine's outputs and requests, as they travel in a simulation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from migration.messages import RequestId
from pd_serve.comm.messages import TokenHeader
from pd_serve.comm.outputs import OutputBatch, RequestOutput
from pd_serve.simulated_engine import sequence
from pd_serve.simulated_engine.contents import Prompt, SegmentPrompt, TokenPrompt
from pd_serve.simulated_engine.settings import SEGMENT_TOKENS


@dataclass(slots=True)
class SimulatedOutput:
    """New tokens of one request; a `pd_serve.comm.outputs.RequestOutput`.

    Attributes:
        times: How many seconds it has waited, and its prefill has taken; with the first token only.
        delivered: When its first tokens reached the client, in seconds of virtual time: several steps share
            this message. The other tokens reach the client with it.
        prompt: Tokens of its prompt, and those that the prefix cache had; with the first token only.
    """

    request_id: RequestId
    new_token_ids: list[int]
    finish_reason: object
    times: tuple[float, float] | None = None
    delivered: list[float] | None = None
    new_logprobs: object = None
    stop_reason: object = None
    prompt: tuple[int, int] | None = None


@dataclass(slots=True)
class SimulatedBatch:
    """A step's outputs for one client; a `pd_serve.comm.outputs.OutputBatch`."""

    outputs: list[RequestOutput]
    scheduler_stats: object = None
    engine_index: int = 0


class SimulatedPayload(msgspec.Struct, frozen=True, array_like=True):
    """A request described by the contents of its prompt in place of its tokens.

    Attributes:
        segments: See `TraceRequest`.
        seed: Stands for the rest of the prompt.
        token_ids: All tokens of a prompt that continues an output, in the place of `segments` and `seed`.
    """

    request_id: str
    prompt_tokens: int
    max_tokens: int
    priority: int
    arrival_s: float
    segments: tuple[int, ...]
    seed: int
    token_ids: tuple[int, ...] = ()

    def encode(self) -> list[bytes]:
        return [msgspec.msgpack.encode(self)]

    @property
    def prompt(self) -> Prompt:
        if self.token_ids:
            return TokenPrompt(self.token_ids)
        return SegmentPrompt(self.prompt_tokens, self.segments, SEGMENT_TOKENS, self.seed)


_payload_decoder = msgspec.msgpack.Decoder(SimulatedPayload)


def decode_payload(payload: list[bytes]) -> sequence.Sequence:
    """Decodes a request for a simulated engine."""
    request = _payload_decoder.decode(payload[0])
    request_id = RequestId(request.request_id)
    return sequence.Sequence(
        request_id, request.prompt, request.max_tokens, request.priority, request.arrival_s, payload
    )


class SimulatedCodec:
    """Outputs are handed over as they are; see `pd_serve.frontend.output_codec.OutputCodec`."""

    def decode(self, frames: Sequence[Any]) -> tuple[TokenHeader, SimulatedBatch]:
        return frames[0], frames[1]

    def prefill_s(self, batch: OutputBatch, output: RequestOutput) -> float | None:
        assert isinstance(output, SimulatedOutput)
        return None if output.times is None else output.times[1]

    def failed(self, request_id: str) -> SimulatedBatch:
        return SimulatedBatch([SimulatedOutput(RequestId(request_id), [], "error")])
