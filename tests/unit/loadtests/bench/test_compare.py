"""The order of the arms, and what is checked before a comparison starts."""

import pytest

from loadtests.bench import compare
from loadtests.bench.arms import TITLES, Arm
from pd_serve.errors import PdServeError

ARMS = [Arm(name, []) for name in TITLES]


def test_every_arm_is_first_in_one_of_four_rounds() -> None:
    orders = [[arm.name for arm in compare.turns(ARMS, number)] for number in range(4)]

    assert all(sorted(order) == sorted(arm.name for arm in ARMS) for order in orders)
    assert len({order[0] for order in orders}) == 4


def test_engines_that_do_not_fit_are_refused_before_anything_is_started() -> None:
    with pytest.raises(PdServeError, match="--engines 4999"):
        compare.check_memory(5000)


def test_the_versions_of_both_routers_are_locked() -> None:
    assert set(compare.router_versions()) == {"vllm-router", "sglang-router"}
