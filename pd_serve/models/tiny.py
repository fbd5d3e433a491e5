"""Small random Llama models, made from a seed in about a second, the same bytes on every machine."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from pd_serve.models import byte_tokenizer
from pd_serve.models.random_weights import (
    GAIN,
    Weights,
    embeddings,
    leave_out_bias,
    output_head,
    uniform,
    write_json,
    write_tokenizer,
)


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


def build(model: RandomLlama, directory: Path) -> None:
    """Write `model` and its tokenizer into the existing, empty `directory`."""
    from safetensors.numpy import save_file

    save_file(weights(model), directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", config(model))
    write_tokenizer(directory, model.max_context_tokens)


def config(model: RandomLlama) -> dict[str, Any]:
    """Its `config.json`."""
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


def weights(model: RandomLlama) -> Weights:
    """Every parameter by its name in `transformers`."""
    bits = np.random.PCG64(model.seed)
    hidden = model.hidden_size
    made: Weights = {}

    made["model.embed_tokens.weight"] = embeddings(bits, hidden)

    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        for name, shape in layer_shapes(model):
            part = name.rsplit(".", 1)[1]
            matrix = uniform(bits, shape, std=GAIN[part] / sqrt(shape[1]))
            leave_out_bias(part, matrix)
            made[f"{prefix}.{name}.weight"] = matrix
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"{prefix}.{norm}.weight"] = np.ones(hidden, np.float32)
    made["model.norm.weight"] = np.ones(hidden, np.float32)

    made["lm_head.weight"] = output_head(bits, hidden)
    return made


def layer_shapes(model: RandomLlama) -> Iterator[tuple[str, tuple[int, int]]]:
    """The matrices of a layer, by name, with their (outputs, inputs)."""
    queries = model.num_heads * model.head_dim
    keys = model.num_kv_heads * model.head_dim
    yield "self_attn.q_proj", (queries, model.hidden_size)
    yield "self_attn.k_proj", (keys, model.hidden_size)
    yield "self_attn.v_proj", (keys, model.hidden_size)
    yield "self_attn.o_proj", (model.hidden_size, queries)
    yield "mlp.gate_proj", (model.intermediate_size, model.hidden_size)
    yield "mlp.up_proj", (model.intermediate_size, model.hidden_size)
    yield "mlp.down_proj", (model.hidden_size, model.intermediate_size)
