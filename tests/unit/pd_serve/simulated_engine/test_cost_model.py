"""The linear cost model of engine steps."""

import pytest

from pd_serve.simulated_engine.cost_model import COST_MODELS, LinearCostModel

MODEL = LinearCostModel((10.0, 2.0, 0.5), (20.0, 3.0, 0.1))


def test_a_prefill_costs_a_constant_its_tokens_and_their_squares_per_prompt() -> None:
    assert MODEL.prefill_s([(4, 0), (2, 0)]) == pytest.approx((10 + 2 * 6 + 0.5 * (16 + 4)) / 1000)


def test_the_chunks_of_a_prompt_cost_as_much_as_the_whole_but_for_the_constant() -> None:
    whole = MODEL.prefill_s([(10, 0)])
    chunks = MODEL.prefill_s([(4, 0)]) + MODEL.prefill_s([(6, 4)])

    assert chunks - whole == pytest.approx(0.010)


def test_a_decode_costs_a_constant_its_requests_and_their_context() -> None:
    assert MODEL.decode_s(2, 100) == pytest.approx((20 + 3 * 2 + 0.1 * 100) / 1000)


def test_a_mixed_step_counts_one_constant() -> None:
    both = MODEL.prefill_s([(4, 0)]) + MODEL.decode_s(2, 100)

    assert MODEL.mixed_s([(4, 0)], 2, 100) == pytest.approx(both - 0.010)


@pytest.mark.parametrize("name", COST_MODELS)
def test_a_mixed_step_of_one_kind_costs_as_much_as_that_kind(name: str) -> None:
    model = COST_MODELS[name]

    assert model.mixed_s([(100, 0)], 0, 0) == model.prefill_s([(100, 0)])
    assert model.mixed_s([], 8, 4000) == model.decode_s(8, 4000)
