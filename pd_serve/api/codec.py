"""vLLM's msgpack encoding of requests and outputs."""

import time
from collections.abc import Callable, Sequence

import msgspec
from vllm.v1.engine import (
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from pd_serve.comm.messages import TokenHeader
from pd_serve.comm.wire import MAX_FRAME_BYTES
from pd_serve.errors import InvalidRequestError

_fields = msgspec.msgpack.Decoder(list[msgspec.Raw])
_ARRIVAL = EngineCoreRequest.__struct_fields__.index("arrival_time")


def arriving_now(frames: list[bytes], now: Callable[[], float] = time.time) -> list[bytes]:
    """An encoded request as if it had arrived now."""
    fields = _fields.decode(frames[0])
    fields[_ARRIVAL] = msgspec.Raw(msgspec.msgpack.encode(now()))
    return [msgspec.msgpack.encode(fields), *frames[1:]]


class VllmCodec:
    """See `pd_serve.frontend.output_codec.OutputCodec`."""

    def __init__(self) -> None:
        self._header = msgspec.msgpack.Decoder(TokenHeader)
        self._outputs = MsgpackDecoder(EngineCoreOutputs)
        self._encoder = MsgpackEncoder()

    def encode_request(self, request: EngineCoreRequest) -> list[bytes]:
        """Encodes a request as frames.

        Raises:
            InvalidRequestError: It is longer than a message may be, or has what no message can have: a number
                of more than 64 bits, half a surrogate pair, lists within lists without end.
        """
        try:
            frames = [bytes(frame) for frame in self._encoder.encode(request)]
        except (OverflowError, UnicodeEncodeError, RecursionError) as error:
            raise InvalidRequestError(
                f"A value of the request cannot be sent to an engine: {error}"
            ) from None
        if max(map(len, frames)) > MAX_FRAME_BYTES:
            raise InvalidRequestError(
                f"The request takes more than {MAX_FRAME_BYTES} bytes on its way to an engine."
            )
        return frames

    def decode(self, frames: Sequence[bytes]) -> tuple[TokenHeader, EngineCoreOutputs]:
        """Decodes a message of a token socket. Its times are of this process's monotonic clock.

        vLLM's metrics subtract the times of one request from each other, and a request's instances may be on
        machines whose clocks differ by days. So the message counts as sent when it arrives; its events keep
        their distance from that.
        """
        header = self._header.decode(frames[0])
        if header.report is not None:
            return header, EngineCoreOutputs()
        batch = self._outputs.decode(frames[1:])
        now = time.monotonic()
        ahead_s, batch.timestamp = now - batch.timestamp, now
        for output in batch.outputs:
            for event in output.events or ():
                event.timestamp += ahead_s
        return header, batch

    def prefill_s(self, batch: EngineCoreOutputs, output: EngineCoreOutput) -> float | None:
        """Time since the prefill began, from the engine's events."""
        begun = [e.timestamp for e in output.events or () if e.type == EngineCoreEventType.SCHEDULED]
        return batch.timestamp - begun[-1] if begun else None

    def failed(self, request_id: str) -> EngineCoreOutputs:
        output = EngineCoreOutput(request_id, [], finish_reason=FinishReason.ERROR)
        return EngineCoreOutputs(outputs=[output])
