"""The load of the service with simulated engines."""

import statistics

import pytest

from loadtests.bench import simulated_service, simulated_side
from loadtests.bench.load import Load


@pytest.mark.parametrize("layout", simulated_service.LAYOUTS)
def test_the_engines_have_batches_and_keep_up(layout: dict[str, int]) -> None:
    requests = Load("lengths", 100, simulated_service.LENGTHS, rate=simulated_service.RATE).requests(seed=0)

    outcomes = simulated_side.simulate(
        simulated_side.config(
            requests, layout, simulated_service.engines(), simulated_service.NETWORK, seed=0
        )
    )

    batch = simulated_service.RATE * statistics.mean(one.e2e_s for one in outcomes) / 4
    assert 6 <= batch <= 12
    assert max(one.ttft_s or 0.0 for one in outcomes) < 1.0
