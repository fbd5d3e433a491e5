"""Step times from datasheets, against measured ones."""

import pytest

from pd_serve.simulated_engine.roofline import kv_bytes_per_token, roofline

LLAMA_8B = "llama-3.1-8b"


@pytest.mark.parametrize(("tokens", "measured_ms"), [(128, 8.0), (1024, 15.8), (4096, 57), (8192, 116)])
def test_prompts_take_about_as_long_as_measured_on_a_b200(tokens: int, measured_ms: float) -> None:
    assert roofline("b200", 1, LLAMA_8B).prefill_s([(tokens, 0)]) == pytest.approx(
        measured_ms * 1e-3, rel=0.15
    )


@pytest.mark.parametrize("batch", [1, 32, 128])
def test_decode_steps_take_about_as_long_as_measured_on_a_b200(batch: int) -> None:
    measured_s = (4.07 + 0.0404 * batch) * 1e-3

    assert roofline("b200", 1, LLAMA_8B).decode_s(batch, batch * 100) == pytest.approx(measured_s, rel=0.3)


def test_the_cache_of_a_token_is_keys_and_values_of_all_layers() -> None:
    assert kv_bytes_per_token(LLAMA_8B) == 128 * 1024
    assert kv_bytes_per_token("llama-3.1-70b") == 320 * 1024


def test_a_mixed_step_costs_more_than_either_part_and_less_than_both() -> None:
    model = roofline("h100", 1, LLAMA_8B)
    prompt, decodes, both = (
        model.prefill_s([(512, 0)]),
        model.decode_s(64, 64_000),
        model.mixed_s([(512, 0)], 64, 64_000),
    )

    assert max(prompt, decodes) < both < prompt + decodes


def test_the_chunks_of_a_prompt_cost_about_as_much_as_the_whole() -> None:
    model = roofline("h100", 1, LLAMA_8B)

    chunks = sum(model.prefill_s([(2048, before)]) for before in range(0, 8192, 2048))

    assert model.prefill_s([(8192, 0)]) < chunks < model.prefill_s([(8192, 0)]) + 0.015


def test_more_gpus_are_faster_but_not_in_proportion() -> None:
    four, eight = (roofline("h100", width, "llama-3.1-70b").decode_s(32, 32_000) for width in (4, 8))

    assert four / 2 < eight < four
