"""Hardware by name or from a file."""

import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine.cost_model import COST_MODELS
from pd_serve.simulated_engine.hardware import hardware, known_names


@pytest.mark.parametrize("name", known_names())
def test_every_known_name_is_all_of_the_hardware(name: str) -> None:
    found = hardware(name)

    assert found.engine.num_blocks >= 500
    assert found.engine.cost_model.decode_s(1, 100) > 0
    assert not found.unknown
    assert found.start_s > 0


def test_the_papers_hardware_has_its_fitted_numbers() -> None:
    found = hardware("a10-llama-7b")

    assert found.engine.cost_model is COST_MODELS["a10-llama-7b"]
    assert (found.engine.num_blocks, found.engine.kv_bytes_per_token) == (780, 512 * 1024)
    assert found.engine.chunk_tokens is None


def test_both_models_are_known_on_all_gpus() -> None:
    for gpu in ("a10", "a100", "h100", "h200", "b200"):
        for model in ("llama-3.1-8b", "llama-3.1-70b"):
            assert any(n.startswith(gpu) and n.endswith(model) for n in known_names()), (gpu, model)
    assert "h100-llama-3.1-8b" in known_names()
    assert "h100x4-llama-3.1-70b" in known_names()


def test_an_instance_has_the_cache_that_the_weights_leave_and_the_links_of_its_gpus() -> None:
    one, four = hardware("h100-llama-3.1-8b"), hardware("h100x4-llama-3.1-70b")

    assert one.engine.num_blocks == pytest.approx(26_500, rel=0.02)
    assert four.num_gpus == 4
    assert four.kv_bytes_per_s == 4 * one.kv_bytes_per_s
    assert four.start_s > one.start_s


def test_any_width_can_be_named() -> None:
    four, eight = (hardware(f"h100x{width}-llama-3.1-70b").engine.num_blocks for width in (4, 8))

    assert eight > four


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100", "known: a10-llama-7b"),
        ("h1000-llama-3.1-8b", "neither known nor a file"),
        ("h100-llama-3.1-70b", "have no room in 1 x 80 GB: name more GPUs, as in h100x4-llama-3.1-70b"),
        ("h100x16-llama-3.1-70b", "from 1 to 8 GPUs"),
        ("h100x0-llama-3.1-8b", "from 1 to 8 GPUs"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused(name: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        hardware(name)
