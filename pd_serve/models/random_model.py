"""Random models of any kind: transformers gives names and shapes, a stream for each name the values.

Beside the rules of `random_weights.py`: a state that is rewritten at every token (Mamba-2, gated delta net)
has heads that forget within a few tokens and heads that remember hundreds, so that a state that is lost shows
in the text.
"""

import hashlib
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pd_serve.models.kinds import MAX_CONTEXT_TOKENS, ModelKind
from pd_serve.models.random_weights import (
    GAIN,
    WRITERS,
    Array,
    embeddings,
    leave_out_bias,
    output_head,
    uniform,
    write_json,
    write_tokenizer,
)

if TYPE_CHECKING:
    import torch

#: Change it with the rules.
_RULES = "1"

_DEFAULT_GAIN = 1.5


def recipe(kind: ModelKind) -> str:
    """What names the result of `build` for `kind`: it changes with the rules and with the kind."""
    return f"{_RULES}-{hashlib.sha256(repr(kind).encode()).hexdigest()[:8]}"


def build(kind: ModelKind, directory: Path) -> None:
    """Write a random model of `kind` and its tokenizer into the existing, empty `directory`."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    logging.disable_progress_bar()
    write_json(directory / "config.json", kind.config)
    config = CONFIG_MAPPING[kind.config["model_type"]].from_pretrained(directory)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter, kind)
    model.save_pretrained(directory)
    write_json(directory / "config.json", kind.config)  # transformers writes its own reading of it
    write_tokenizer(directory, MAX_CONTEXT_TOKENS)


def _fill(name: str, parameter: "torch.nn.Parameter", kind: ModelKind) -> None:
    """Set one parameter; the weights of norms stay as they are made, one or zero by the model's own rule."""
    import torch

    part = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if "norm" not in part:
        values = _values(name, part, tuple(parameter.shape), kind)
        parameter.copy_(torch.from_numpy(values))  # one rounding, if the model is not of float32


def _values(name: str, part: str, shape: tuple[int, ...], kind: ModelKind) -> Array:
    hidden = kind.config["hidden_size"]
    bits = np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()))
    if part == "dt_bias":  # of softplus, which is the step: from 0.002, which remembers 400 tokens, to 0.7
        return np.linspace(-6.0, 0.0, shape[0]).astype(np.float32)
    if part.endswith("bias") or part == "A_log":
        return np.zeros(shape, np.float32)
    if part == "D":
        return np.full(shape, 0.25, np.float32)
    if len(shape) == 1:
        return uniform(bits, shape, std=1.0)
    if part == "conv1d":
        return uniform(bits, shape, std=_DEFAULT_GAIN / sqrt(shape[-1]))
    if part in ("embed_tokens", "embeddings"):
        return embeddings(bits, hidden, kind.embedding_std)
    if part == "lm_head":
        return output_head(bits, hidden)
    return _matrix(bits, part, shape, hidden)


def _matrix(bits: np.random.PCG64, part: str, shape: tuple[int, ...], hidden: int) -> Array:
    """A matrix, or one for each expert: (outputs, inputs), in some models' experts (inputs, outputs)."""
    outputs, inputs = -2, -1
    if len(shape) == 3 and (shape[outputs] == hidden) != (part in WRITERS):
        outputs, inputs = inputs, outputs
    values = uniform(bits, shape, std=GAIN.get(part, _DEFAULT_GAIN) / sqrt(shape[inputs]))
    leave_out_bias(part, values, outputs, inputs)
    return values
