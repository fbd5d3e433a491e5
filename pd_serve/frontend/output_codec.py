"""What the request router knows of an engine's outputs: as little as it needs to put them in order."""

from collections.abc import Sequence
from typing import Any, Protocol

from pd_serve.comm.messages import TokenHeader


class OutputBatch(Protocol):
    """One step's outputs for one API server; vLLM's `EngineCoreOutputs`, or a simulated engine's.

    Attributes:
        outputs: Each with `request_id`, `new_token_ids`, `new_logprobs` and `finish_reason`.
        engine_index: Which engine, as a slot number; set by the router.
    """

    outputs: list[Any]
    scheduler_stats: Any
    engine_index: int


class OutputCodec(Protocol):
    def decode(self, frames: Sequence[Any]) -> tuple[TokenHeader, Any]:
        """A message of a token socket: its header, and its `OutputBatch`."""

    def prefill_s(self, batch: Any, output: Any) -> float | None:
        """How long the prefill that this first output ends has taken, if the engine says so."""

    def failed(self, request_id: str) -> Any:
        """An `OutputBatch` that ends a request with an error."""
