"""LoRA adapters: different from each other, and the same bytes everywhere."""

import hashlib
import json
from pathlib import Path

from safetensors import safe_open

from pd_serve.models import resolve
from pd_serve.models.lora import adapters


def test_adapters_are_the_ones_of_every_other_machine() -> None:
    digests = [
        hashlib.sha256((Path(directory) / "adapter_model.safetensors").read_bytes()).hexdigest()[:8]
        for directory in adapters(3)
    ]
    assert digests == ["9a267cfa", "14722b71", "9daf0fb6"]


def test_an_adapter_fits_every_matrix_of_the_tiny_model() -> None:
    (directory,) = adapters(1)
    config = json.loads((Path(directory) / "adapter_config.json").read_text())
    with (
        safe_open(Path(resolve("tiny")) / "model.safetensors", "np") as model,
        safe_open(Path(directory) / "adapter_model.safetensors", "np") as adapter,
    ):
        matrices = [name for name in model.keys() if name.endswith("_proj.weight")]  # noqa: SIM118
        assert len(adapter.keys()) == 2 * len(matrices) == 2 * 4 * len(config["target_modules"])
        for name in matrices:
            prefix = "base_model.model." + name.removesuffix(".weight")
            down = adapter.get_slice(f"{prefix}.lora_A.weight").get_shape()
            up = adapter.get_slice(f"{prefix}.lora_B.weight").get_shape()
            assert [up[0], down[1]] == model.get_slice(name).get_shape()
            assert up[1] == down[0] == config["r"]


def test_adapters_are_built_once() -> None:
    first = adapters(2)
    made_at = [(Path(directory) / "adapter_config.json").stat().st_mtime_ns for directory in first]
    again = adapters(2)
    assert again == first
    assert [(Path(directory) / "adapter_config.json").stat().st_mtime_ns for directory in again] == made_at
