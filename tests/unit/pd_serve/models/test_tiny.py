"""Random models: the same bytes everywhere, in the documented sizes."""

import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from pd_serve.models import resolve


def num_parameters(directory: str) -> int:
    with safe_open(Path(directory) / "model.safetensors", "np") as weights:
        return sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def read_json(directory: str, name: str) -> dict[str, object]:
    return json.loads((Path(directory) / name).read_text())


def test_two_builds_are_byte_identical(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = Path(resolve("tiny"))
    monkeypatch.setenv("PD_SERVE_CACHE", str(tmp_path / "other"))
    second = Path(resolve("tiny"))
    names = sorted(path.name for path in first.iterdir())
    assert first != second
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_weights_are_the_ones_of_every_other_machine() -> None:
    with safe_open(Path(resolve("tiny")) / "model.safetensors", "np") as weights:
        down = weights.get_tensor("model.layers.3.mlp.down_proj.weight")
    assert down.dtype == np.float32
    assert [float(value).hex() for value in down[1, :3]] == [
        "0x1.579fb00000000p-5",
        "-0x1.9e10e00000000p-5",
        "-0x1.02bb0c0000000p-6",
    ]


def test_tiny_has_a_million_parameters_in_float32() -> None:
    directory = resolve("tiny")
    config = read_json(directory, "config.json")
    assert 900_000 < num_parameters(directory) < 1_200_000
    assert config["max_position_embeddings"] == 8192
    assert config["dtype"] == "float32"


def test_bench_has_a_heavy_kv_cache() -> None:
    directory = resolve("bench")
    config = read_json(directory, "config.json")
    sizes = [config[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_dim")]
    assert prod(int(str(size)) for size in sizes) * 2 * 4 == 32 * 1024
    assert 70_000_000 < num_parameters(directory) < 78_000_000
