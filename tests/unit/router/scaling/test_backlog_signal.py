"""Scaling by prompt tokens that wait."""

import pytest

from router.policies import policy_set
from router.scaling.backlog_signal import BacklogSignal
from tests.unit.router.made_loads import prefill


@pytest.mark.parametrize(
    ("tokens", "starting", "change"),
    [(9000, 0, 1), (8000, 0, 0), (9000, 1, 0), (600, 0, 0), (400, 0, -1), (400, 1, 0)],
)
def test_a_prefill_pool_goes_by_the_prompt_tokens_that_wait(tokens: int, starting: int, change: int) -> None:
    """Of two instances: as many tokens each."""
    pool = [prefill(f"p{n}", tokens) for n in range(2)]

    assert BacklogSignal().look(pool, starting, policy_set("llumnix-paper")).instances == change
