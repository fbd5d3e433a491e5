"""Step times from the numbers of datasheets: a step takes as long as its arithmetic or its memory traffic."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

#: Bytes of a weight and of a number in the KV cache: bfloat16.
NUMBER_BYTES = 2

DATA = Path(__file__).with_name("hardware.toml")


@dataclass(frozen=True, slots=True)
class Roofline:
    """A `CostModel` of one transformer on one or several GPUs.

    A step's time is the greater of arithmetic and memory traffic, and what engines spend besides. All kinds
    of steps follow from the one formula.

    Source: Williams et al., Roofline (CACM 2009); the numbers and their sources are in `hardware.toml`.

    Attributes:
        flops_per_token: Operations of all weights for one token.
        attention_flops: Operations for one pair of a new token and a token of its context.
        weight_bytes: Read in every step.
        kv_bytes_per_token: Read for each token of context.
        flops_per_s, bytes_per_s: What all GPUs together reach.
        step_s, prompt_step_s, request_s: Time of a step besides, of one with prompts, and of each request.
        token_s: Time to exchange one token's activations between the GPUs.
    """

    flops_per_token: float
    attention_flops: float
    weight_bytes: float
    kv_bytes_per_token: int
    flops_per_s: float
    bytes_per_s: float
    step_s: float
    prompt_step_s: float
    request_s: float
    token_s: float

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        return self.mixed_s(chunks, 0, 0)

    def decode_s(self, batch_size: int, context_tokens: int) -> float:
        return self.mixed_s((), batch_size, context_tokens)

    def mixed_s(self, chunks: Sequence[tuple[int, int]], batch_size: int, context_tokens: int) -> float:
        tokens, pairs, read = batch_size, float(context_tokens), context_tokens
        for new, before in chunks:
            tokens += new
            pairs += new * (before + new / 2)
            read += before + new
        arithmetic = (self.flops_per_token * tokens + self.attention_flops * pairs) / self.flops_per_s
        traffic = (self.weight_bytes + self.kv_bytes_per_token * read) / self.bytes_per_s
        besides = self.step_s + self.request_s * (batch_size + len(chunks)) + self.token_s * tokens
        return max(arithmetic, traffic) + besides + (self.prompt_step_s if chunks else 0.0)


def roofline(gpu: str, width: int, model: str) -> Roofline:
    """A model of `hardware.toml` on `width` of its GPUs with tensor parallelism."""
    engine, device, net = data()["engine"], data()["gpu"][gpu], data()["model"][model]
    layers, hidden = net["layers"], net["hidden"]
    exchanges = 2 * layers if width > 1 else 0  # all-reduces of a step
    exchanged = 2 * (width - 1) / width * hidden * NUMBER_BYTES  # bytes per GPU, token and all-reduce
    return Roofline(
        flops_per_token=2 * net["parameters"],
        attention_flops=4 * layers * hidden,
        weight_bytes=net["parameters"] * NUMBER_BYTES,
        kv_bytes_per_token=kv_bytes_per_token(model),
        flops_per_s=width * device["flops"] * engine["compute_share"],
        bytes_per_s=width * device["memory_bytes_per_s"] * engine["bandwidth_share"],
        step_s=engine["step_s"] + exchanges * engine["all_reduce_s"],
        prompt_step_s=engine["prompt_step_s"],
        request_s=engine["request_s"],
        token_s=exchanges * exchanged / (device["link_bytes_per_s"] * engine["link_share"]),
    )


def kv_bytes_per_token(model: str) -> int:
    """Bytes of KV cache per token, over all GPUs: keys and values of all layers."""
    net: dict[str, int] = data()["model"][model]
    return 2 * net["layers"] * net["kv_heads"] * net["head_dim"] * NUMBER_BYTES


@cache
def data() -> dict[str, Any]:
    """The contents of `hardware.toml`."""
    return tomllib.loads(DATA.read_text(encoding="utf-8"))
