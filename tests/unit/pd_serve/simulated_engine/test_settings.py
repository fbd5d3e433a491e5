"""Settings of simulated engines by role."""

import pytest

from pd_serve.simulated_engine.cost_model import LinearCostModel
from pd_serve.simulated_engine.settings import EngineSettings

SETTINGS = EngineSettings(LinearCostModel((5.0, 1.0, 0.0), (10.0, 1.0, 0.0)), max_prefill_tokens=6000)


@pytest.mark.parametrize(
    ("role", "tokens", "budget"),
    [("decode", 256, 256), ("decode", 0, None), ("prefill", 256, None), ("neutral", 256, None)],
)
def test_decode_instances_take_prompts_within_a_budget(role: str, tokens: int, budget: int | None) -> None:
    of_role = SETTINGS.of_role(role, tokens)
    assert of_role.prompt_budget == budget
    assert of_role.mixes == (budget is not None)
    assert of_role.step_prompt_tokens == (budget or 6000)
