"""An EAGLE head for the model `tiny`, which drafts what the model says, most of the time.

A head gets the token after each position and what the model has computed there. This one reads the tokens
alone: it is the model's own layers, one position behind, so that it lacks the first token of each prompt.
"""

from math import sqrt
from pathlib import Path

import numpy as np

from pd_serve.models.cache import cached_directory
from pd_serve.models.random_weights import Weights, write_json
from pd_serve.models.tiny import TINY, config, weights

#: Change it with the code: it is part of the directory's name.
_RECIPE = f"1-{TINY.recipe}"


def eagle_head() -> str:
    """The directory of the head, built on first use. It is 4 layers of 0.25 million parameters."""
    return str(cached_directory(f"tiny-eagle-r{_RECIPE}", build))


def build(directory: Path) -> None:
    """Write the head into the existing, empty `directory`."""
    from safetensors.numpy import save_file

    save_file(_weights(), directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", config(TINY))


def _weights() -> Weights:
    """The layers of `tiny` under vLLM's names for a head; embeddings and `lm_head` are the model's own."""
    head = {
        name.removeprefix("model."): matrix
        for name, matrix in weights(TINY).items()
        if name.startswith("model.layers.")
    }
    # A head has no norm before its first layer: that of an embedding, whose squares have a mean of 2 (1 of
    # the constant), is put into the weights.
    del head["layers.0.input_layernorm.weight"]
    for part in ("q_proj", "k_proj", "v_proj"):
        head[f"layers.0.self_attn.{part}.weight"] /= np.float32(sqrt(2.0))
    only_the_token = np.zeros((TINY.hidden_size, 2 * TINY.hidden_size), np.float32)
    only_the_token[:, : TINY.hidden_size] = np.eye(TINY.hidden_size, dtype=np.float32)
    return head | {"fc.weight": only_the_token}
