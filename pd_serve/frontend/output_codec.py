"""Interface of the codec with which an API server decodes the outputs of engines."""

from collections.abc import Sequence
from typing import Protocol

from pd_serve.comm.messages import TokenHeader
from pd_serve.comm.outputs import OutputBatch, RequestOutput


class OutputCodec(Protocol):
    """The encoding of one kind of engine."""

    def decode(self, frames: Sequence[bytes]) -> tuple[TokenHeader, OutputBatch]:
        """Decodes a message of a token socket."""

    def prefill_s(self, batch: OutputBatch, output: RequestOutput) -> float | None:
        """Duration of the prefill of a first output, in seconds; None if the engine does not report it."""

    def failed(self, request_id: str) -> OutputBatch:
        """A batch that ends a request with an error."""
