"""How long an engine's steps take, in seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class CostModel(Protocol):
    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        """A step over prompts only.

        Args:
            chunks: (new tokens, tokens already in the cache) per prompt.
        """

    def decode_s(self, batch_size: int, context_tokens: int) -> float:
        """A step of one token each for `batch_size` requests with that many tokens of context together."""

    def mixed_s(self, chunks: Sequence[tuple[int, int]], batch_size: int, context_tokens: int) -> float:
        """A step of chunked prefill: some prompts' chunks and one token for each decoding request."""


@dataclass(frozen=True, slots=True)
class LinearCostModel:
    """Prefill p0 + p1 n + p2 n²; decode d0 + d1 batch + d2 context. All in milliseconds.

    n² is taken per prompt, where attention is: a chunk of c tokens after h others costs p2 (c² + 2 c h).
    A mixed step runs both over the same weights, so its constant is counted once.

    Attributes:
        mixed_ms: Constant of a mixed step; None for the greater one of the two kinds.

    Source: fitted to the Llumnix paper's figure 10 and its artifact.
    """

    prefill_ms: tuple[float, float, float]
    decode_ms: tuple[float, float, float]
    mixed_ms: float | None = None

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        constant, linear, square = self.prefill_ms
        new = sum(n for n, _ in chunks)
        squares = sum(n * (n + 2 * before) for n, before in chunks)
        return (constant + linear * new + square * squares) * 1e-3

    def decode_s(self, batch_size: int, context_tokens: int) -> float:
        constant, per_request, per_token = self.decode_ms
        return (constant + per_request * batch_size + per_token * context_tokens) * 1e-3

    def mixed_s(self, chunks: Sequence[tuple[int, int]], batch_size: int, context_tokens: int) -> float:
        if not batch_size:
            return self.prefill_s(chunks)
        if not chunks:
            return self.decode_s(batch_size, context_tokens)
        constants = self.prefill_ms[0], self.decode_ms[0]
        constant = max(constants) if self.mixed_ms is None else self.mixed_ms
        both = self.prefill_s(chunks) + self.decode_s(batch_size, context_tokens)
        return both + (constant - sum(constants)) * 1e-3


#: By the name of the hardware; see `pd_serve.simulated_engine.hardware`.
COST_MODELS = {
    "a10-llama-7b": LinearCostModel((5.6, 0.2028, 5.09e-6), (38.0, 0.45, 1.33e-3)),
    "a100-opt-13b": LinearCostModel((22.05, 0.1405, 8.08e-6), (23.48, 0.0607, 5.93e-4)),
    "4xa100-opt-66b": LinearCostModel((42.97, 0.2129, 4.60e-5), (39.58, 0.1358, 6.95e-4)),
}
