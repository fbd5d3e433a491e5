"""Generated lengths have the distributions of the paper."""

import numpy as np
import pytest

from pd_serve.simulation.lengths import GENERATED, generate

#: Llumnix (OSDI 2024), table 1: P50, P80, P95, P99 of the prompts.
PAPER_QUANTILES = {"s-s": (38, 113, 413, 1464), "m-m": (32, 173, 1288, 4208), "l-l": (55, 582, 3113, 5166)}


@pytest.mark.parametrize("name", PAPER_QUANTILES)
def test_generated_prompts_equal_the_papers(name: str) -> None:
    prompts, _ = generate(name, 10_000)

    assert tuple(int(np.percentile(prompts, q)) for q in (50, 80, 95, 99)) == PAPER_QUANTILES[name]


@pytest.mark.parametrize("name", ["sharegpt-paper", "burstgpt"])
def test_curves_through_quantiles_have_those_quantiles_and_that_mean(name: str) -> None:
    for distribution, drawn in zip(GENERATED[name], generate(name, 200_000), strict=True):
        wanted = (distribution.p50, distribution.p80, distribution.p95, distribution.p99)  # type: ignore[union-attr]
        assert np.percentile(drawn, (50, 80, 95, 99)) == pytest.approx(wanted, rel=0.03)
        assert drawn.mean() == pytest.approx(distribution.mean, rel=0.02)


def test_mixed_traces_take_prompts_of_one_and_outputs_of_the_other() -> None:
    prompts, outputs = generate("s-l", 10_000)

    assert prompts.tolist() == generate("s-s", 10_000)[0].tolist()
    assert outputs.mean() == pytest.approx(512, rel=0.01)
