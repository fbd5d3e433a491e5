"""Whole simulations with runs of steps as one event give what they give step by step, to the last bit."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_serve.simulated_engine.hardware import hardware
from pd_serve.simulation.config import SimulationConfig
from pd_serve.simulation.result import SimulationResult
from pd_serve.simulation.simulate import simulate
from pd_serve.simulation.workloads import TraceSpec, make_requests
from router.scaling import PoolBounds
from tests.unit.pd_serve.simulation.test_simulate import (
    ANY_CLUSTER,
    ENGINE,
    assert_nothing_is_lost,
    config,
    workload,
)

PD = {"prefill": 1, "decode": 2}
NEUTRAL = {"neutral": 3}

CASES: dict[str, dict[str, Any]] = {
    "disaggregated": {},
    "neutral": {"instances": NEUTRAL, "requests": workload(200, 12.0)},
    "priorities": {"instances": NEUTRAL, "requests": workload(200, 12.0, high=0.2)},
    "too little memory": {
        "instances": {"neutral": 2},
        "engines": {"neutral": replace(ENGINE, num_blocks=60)},
        "requests": workload(100, 8.0, 1, high=0.1),
    },
    "chunked prefill": {"engines": {"neutral": replace(ENGINE, chunk_tokens=128)}},
    "prefix caching": {
        "instances": {"neutral": 2},
        "engines": {"neutral": replace(ENGINE, prefix_caching=True, num_blocks=90)},
        "requests": workload(120, 8.0, 2),
    },
    "prompts anywhere": {
        "policy": "conditional",
        "engines": {"neutral": replace(ENGINE, prefix_caching=True, chunk_tokens=128)},
        "requests": workload(120, 10.0, 3),
    },
    "scaling": {
        "instances": {"neutral": 1},
        "autoscale": {"neutral": PoolBounds(1, 5)},
        "requests": workload(200, 20.0, 4),
        "start_instance_s": 3.0,
        "policy": "llumnix-paper",
    },
    "scaling of pools": {
        "instances": {"prefill": 1, "decode": 1},
        "autoscale": {"decode": PoolBounds(1, 4), "prefill": PoolBounds(1, 3)},
        "requests": workload(200, 14.0, 5),
        "start_instance_s": 3.0,
    },
    "roles": {
        "instances": {"prefill": 2, "decode": 2},
        "overrides": {"roles": True},
        "requests": workload(150, 10.0, 6),
    },
    "a target of the time per token": {
        "instances": NEUTRAL,
        "overrides": {"itl_target_s": 0.06},
        "requests": workload(150, 10.0, 7),
    },
    "asynchronous scheduling": {"engines": {"neutral": replace(ENGINE, async_scheduling=True)}},
    "sessions": {
        "instances": {"neutral": 2},
        "engines": {"neutral": replace(ENGINE, prefix_caching=True, num_blocks=780)},
        "requests": make_requests(TraceSpec("sessions:3", 1.0, 30)),
    },
    "other hardware": {
        "engines": {"neutral": replace(hardware("h100-llama-3.1-8b").engine, num_blocks=400)},
        "requests": workload(200, 60.0, 9),
    },
}


def both(wanted: SimulationConfig) -> tuple[SimulationResult, SimulationResult]:
    """The results with runs, and step by step, without the time that they took."""
    results = [simulate(replace(wanted, every_step=every_step)) for every_step in (False, True)]
    for result in results:
        result.wall_s = 0.0
    return results[0], results[1]


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_both_modes_give_the_same_result(changes: dict[str, Any]) -> None:
    by_run, by_step = both(config(**changes))

    assert by_run == by_step
    assert_nothing_is_lost(by_run)


@given(
    **ANY_CLUSTER | {"chunk_tokens": st.sampled_from([None, 96])},
    policy=st.sampled_from(["llumnix", "llumnix-paper", "conditional", "round-robin"]),
)
@settings(max_examples=6)
def test_both_modes_give_the_same_result_whatever_the_cluster(
    seed: int,
    instances: dict[str, int],
    chunk_tokens: int | None,
    prefix_caching: bool,
    num_blocks: int,
    rate: float,
    policy: str,
) -> None:
    engine = replace(ENGINE, num_blocks=num_blocks, chunk_tokens=chunk_tokens, prefix_caching=prefix_caching)
    wanted = config(
        requests=workload(50, rate, seed, high=0.1),
        instances=instances,
        engines={"neutral": engine},
        policy=policy,
    )

    by_run, by_step = both(wanted)

    assert by_run == by_step
