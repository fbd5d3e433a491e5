"""Random models of every kind of engine: the same bytes everywhere, as transformers and vLLM name them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from pd_serve.models import byte_tokenizer, default_dtype, demo_names, resolve
from pd_serve.models.kinds import KINDS, ModelKind

#: Of `model.safetensors`.
DIGESTS = {
    "tiny-mistral": "d72fb028",
    "tiny-gemma3": "b57f8f27",
    "tiny-gpt-oss": "76dd2173",
    "tiny-llama4": "12ab95ef",
    "tiny-mixtral": "862d0277",
    "tiny-deepseek-v2": "cbf4699c",
    "tiny-deepseek-v3": "39f15bd3",
    "tiny-mamba2": "074b1179",
    "tiny-falcon-h1": "9bfc55d5",
    "tiny-granite4": "cc0af5e3",
    "tiny-qwen3-next": "ea23e15e",
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all tests, instead of one for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PD_SERVE_CACHE", str(tmp_path_factory.mktemp("models")))
        yield


def weights_of(name: str) -> Path:
    return Path(resolve(name)) / "model.safetensors"


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_the_ones_of_every_other_machine(name: str) -> None:
    assert hashlib.sha256(weights_of(name).read_bytes()).hexdigest()[:8] == DIGESTS[name]


def test_two_builds_are_byte_identical(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = Path(resolve("tiny-gemma3"))
    monkeypatch.setenv("PD_SERVE_CACHE", str(tmp_path / "other"))
    second = Path(resolve("tiny-gemma3"))
    names = sorted(path.name for path in first.iterdir())
    assert first != second
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@pytest.mark.parametrize("name", KINDS)
def test_transformers_reads_the_configuration(name: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(resolve(name))
    assert config.architectures == KINDS[name].config["architectures"]
    assert config.vocab_size == byte_tokenizer.VOCAB_SIZE
    assert default_dtype(name) == KINDS[name].dtype == KINDS[name].config["dtype"]


@pytest.mark.parametrize("name", KINDS)
def test_no_layer_touches_the_bias_of_the_tokens(name: str) -> None:
    """The first hidden dimension is what the embeddings make it, whatever an expert's axes are."""
    hidden = KINDS[name].config["hidden_size"]
    with safe_open(weights_of(name), "pt") as weights:
        matrices = {n: weights.get_tensor(n) for n in weights.keys()}  # noqa: SIM118
    inside = ("conv1d", "_b_proj", "bias")  # what stands between two matrices of a layer
    layers = {
        name: matrix
        for name, matrix in matrices.items()
        if ".layers." in name and matrix.ndim > 1 and not any(part in name for part in inside)
    }
    assert layers
    for matrix_name, matrix in layers.items():
        left_out = [axis for axis in range(matrix.ndim) if not matrix.select(axis, 0).any()]
        assert hidden in [matrix.shape[axis] for axis in left_out], matrix_name


def test_kinds_are_no_demo_models() -> None:
    assert not KINDS.keys() & set(demo_names())


def test_another_configuration_is_another_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    from pd_serve.models.random_model import recipe

    kind = KINDS["tiny-mistral"]
    wider = ModelKind(kind.groups, kind.config | {"sliding_window": 128})
    assert recipe(wider) != recipe(kind)
    assert weights_of("tiny-mistral").parent.name == f"tiny-mistral-r{recipe(kind)}"
