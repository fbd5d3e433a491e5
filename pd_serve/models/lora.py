"""LoRA adapters for the model `tiny`, made from seeds: each as large as the weights that it is added to.

So the output of an adapter differs from the base model's and from every other adapter's within a few tokens.
"""

import hashlib
from functools import partial
from math import sqrt
from pathlib import Path

import numpy as np

from pd_serve.models.cache import cached_directory
from pd_serve.models.random_weights import WRITERS, Weights, leave_out_bias, uniform, write_json
from pd_serve.models.tiny import TINY, layer_shapes

#: Change it with the code: it is part of the directories' names.
_RECIPE = "1"
_RANK = 8


def adapters(count: int) -> list[str]:
    """The directories of `count` different adapters (PEFT's format) of rank 8, built on first use."""
    return [
        str(cached_directory(f"tiny-lora-{number}-r{_RECIPE}", partial(build, number)))
        for number in range(count)
    ]


def build(number: int, directory: Path) -> None:
    """Write the adapter of this number into the existing, empty `directory`."""
    from safetensors.numpy import save_file

    save_file(_weights(number), directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": _RANK,
        "lora_alpha": _RANK,  # over the rank, this is the factor of the product
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name.rsplit(".", 1)[1] for name, _ in layer_shapes(TINY)],
    }
    write_json(directory / "adapter_config.json", config)


def _weights(number: int) -> Weights:
    """Two matrices beside every one of the model. Like it, they leave the first hidden dimension alone."""
    seed = hashlib.sha256(f"adapter {number}".encode()).digest()
    bits = np.random.PCG64(int.from_bytes(seed))
    weights: Weights = {}
    for layer in range(TINY.num_layers):
        for name, (outputs, inputs) in layer_shapes(TINY):
            down = uniform(bits, (_RANK, inputs), std=1 / sqrt(inputs))
            up = uniform(bits, (outputs, _RANK), std=1 / sqrt(_RANK))
            part = name.rsplit(".", 1)[1]
            leave_out_bias(part, up if part in WRITERS else down)
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            weights |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    return weights
