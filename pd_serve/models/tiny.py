"""Small random Llama models, made from a seed in about a second, the same bytes on every machine.

They behave like a real model: context decides every token, greedy output is varied and mostly letters, and
the end of sequence is rare. Three choices make that so:

- Weights are uniform: integers of the raw PCG64 stream times one float32 scale. Nothing goes through a
  logarithm or a matrix product, so no library version and no CPU changes a bit of them.
- Query and key weights are large, so a head looks at a few past tokens instead of averaging over all. A wrong
  block of KV cache therefore shows in the text, which is what a test of migration needs.
- The first hidden dimension is a constant that no layer reads or writes. It gives `lm_head` a bias per token,
  which Llama lacks: bytes that do not print are kept out, letters are preferred, the end is made rare.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pd_serve.models import byte_tokenizer

Weights = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class RandomLlama:
    """Shape and seed of a random Llama. `recipe` names this exact result; change it with the code."""

    recipe: str
    seed: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 64
    max_context_tokens: int = 8192


TINY = RandomLlama("1", 1, 128, 384, num_layers=4, num_heads=4, num_kv_heads=2)
"""A million parameters, 4 KiB of KV cache per token: for tests and first steps."""

BENCH = RandomLlama("2", 2, 768, 3328, num_layers=8, num_heads=8, num_kv_heads=8)
"""74 million parameters (296 MB), 32 KiB of KV cache per token (128 MiB at 4,096): heavy enough that moving
it is worth measuring. A step reads all weights and the KV cache; real models have far more of the former
(Llama-3.1-8B at 4,096 tokens 31:1, this one 2.2:1), so that their step time depends less on the length."""

# Standard deviation of what each matrix gives for an input of unit variance. Tuned by hand: larger query and
# key gains give more varied text that hangs more on the past, and more float32 noise in the logits. With
# these the noise is about 7e-6 and the best token is on average 1.1 ahead of the second.
_GAIN = {
    "q_proj": 2.25,
    "k_proj": 2.25,
    "v_proj": 1.0,
    "o_proj": 1.5,
    "gate_proj": 1.5,
    "up_proj": 1.5,
    "down_proj": 1.0,
}
_LOGIT_STD = 3.0


def build(model: RandomLlama, directory: Path) -> None:
    """Write `model` and its tokenizer into the existing, empty `directory`."""
    from safetensors.numpy import save_file

    save_file(_weights(model), directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", _config(model))
    generation = {"bos_token_id": byte_tokenizer.BOS_ID, "eos_token_id": byte_tokenizer.EOS_ID}
    _write_json(directory / "generation_config.json", generation | {"pad_token_id": byte_tokenizer.PAD_ID})
    byte_tokenizer.write(directory, model.max_context_tokens)


def _config(model: RandomLlama) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": byte_tokenizer.VOCAB_SIZE,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_context_tokens,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": byte_tokenizer.BOS_ID,
        "eos_token_id": byte_tokenizer.EOS_ID,
        "pad_token_id": byte_tokenizer.PAD_ID,
    }


def _weights(model: RandomLlama) -> Weights:
    bits = np.random.PCG64(model.seed)
    hidden = model.hidden_size
    weights: Weights = {}

    embedding = _uniform(bits, (byte_tokenizer.VOCAB_SIZE, hidden), std=1.0)
    embedding[:, 0] = sqrt(hidden)
    weights["model.embed_tokens.weight"] = embedding

    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        for name, shape in _layer_shapes(model):
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            matrix = _uniform(bits, shape, std=_GAIN[name] / sqrt(shape[1]))
            if name in ("o_proj", "down_proj"):
                matrix[0, :] = 0.0
            else:
                matrix[:, 0] = 0.0
            weights[f"{prefix}.{block}.{name}.weight"] = matrix
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{norm}.weight"] = np.ones(hidden, np.float32)
    weights["model.norm.weight"] = np.ones(hidden, np.float32)

    head = _uniform(bits, (byte_tokenizer.VOCAB_SIZE, hidden), std=_LOGIT_STD / sqrt(hidden))
    head[:, 0] = [_LOGIT_STD * b / sqrt(hidden) for b in byte_tokenizer.LOGIT_BIAS]
    weights["lm_head.weight"] = head
    return weights


def _layer_shapes(model: RandomLlama) -> Iterator[tuple[str, tuple[int, int]]]:
    queries = model.num_heads * model.head_dim
    keys = model.num_kv_heads * model.head_dim
    yield "q_proj", (queries, model.hidden_size)
    yield "k_proj", (keys, model.hidden_size)
    yield "v_proj", (keys, model.hidden_size)
    yield "o_proj", (model.hidden_size, queries)
    yield "gate_proj", (model.intermediate_size, model.hidden_size)
    yield "up_proj", (model.intermediate_size, model.hidden_size)
    yield "down_proj", (model.hidden_size, model.intermediate_size)


def _uniform(bits: np.random.PCG64, shape: tuple[int, int], std: float) -> npt.NDArray[np.float32]:
    """Uniform weights with mean 0 and standard deviation `std`: 24 bits of the stream each, one rounding."""
    raw = bits.random_raw(prod(shape))
    centred = (raw >> np.uint64(40)).astype(np.float32) - np.float32(2**23)
    return (centred * np.float32(std * sqrt(3.0) / 2**23)).reshape(shape)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
