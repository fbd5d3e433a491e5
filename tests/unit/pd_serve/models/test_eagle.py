"""The EAGLE head of the tiny model: the same bytes everywhere, and vLLM's names."""

import hashlib
import json
from pathlib import Path

from safetensors import safe_open

from pd_serve.models import resolve
from pd_serve.models.eagle import eagle_head


def test_the_head_is_the_one_of_every_other_machine() -> None:
    weights = (Path(eagle_head()) / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest()[:8] == "3492ec41"


def test_the_head_has_the_models_shape_and_layers_without_the_first_norm() -> None:
    model, head = Path(resolve("tiny")), Path(eagle_head())
    assert json.loads((head / "config.json").read_text()) == json.loads((model / "config.json").read_text())
    with (
        safe_open(model / "model.safetensors", "np") as whole,
        safe_open(head / "model.safetensors", "np") as drafter,
    ):
        layers = {name for name in whole.keys() if name.startswith("model.layers.")}  # noqa: SIM118
        assert {f"model.{name}" for name in drafter.keys()} - layers == {"model.fc.weight"}  # noqa: SIM118
        assert layers - {f"model.{name}" for name in drafter.keys()} == {  # noqa: SIM118
            "model.layers.0.input_layernorm.weight"
        }
        assert drafter.get_slice("fc.weight").get_shape() == [128, 256]
