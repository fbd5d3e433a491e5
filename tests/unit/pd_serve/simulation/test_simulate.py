"""Whole simulations: real llumlets, router, scheduler and migrations on simulated parts, in virtual time."""

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_serve.comm.timing import FIRST_STEPS, FIRST_STEPS_S, STEP_S
from pd_serve.simulated_engine.cost_model import COST_MODELS
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulation.config import Moves, NetworkSettings, SimulationConfig, TraceRequest
from pd_serve.simulation.result import SimulationResult
from pd_serve.simulation.simulate import RecomputedHandoffs, Simulation, simulate
from pd_serve.simulation.simulated_instance import SimulatedInstance
from pd_serve.simulation.virtual_time import VirtualLoop
from router.scaling import PoolBounds
from router.slo import Slo

ROOT = Path(__file__).parents[4]

ENGINE = EngineSettings(COST_MODELS["a10-llama-7b"], num_blocks=120)


def workload(count: int, rate: float, seed: int = 0, high: float = 0.0) -> list[TraceRequest]:
    dice = random.Random(seed)
    requests, now = [], 0.0
    for _ in range(count):
        now += dice.expovariate(rate)
        prompt, output = (min(700, 1 + int(dice.expovariate(1 / mean))) for mean in (120, 60))
        segments = (dice.randrange(3),) if prompt > 300 else ()
        requests.append(TraceRequest(now, prompt, output, -1 if dice.random() < high else 0, segments))
    return requests


def config(**changes: Any) -> SimulationConfig:
    base: dict[str, Any] = {
        "requests": workload(120, 8.0),
        "instances": {"prefill": 1, "decode": 2},
        "policy": "llumnix",
        "engines": {"neutral": ENGINE},
    }
    return SimulationConfig(**(base | changes))


def assert_nothing_is_lost(result: SimulationResult) -> None:
    assert sum(record.lost for record in result.records) == 0
    assert sum(record.duplicated for record in result.records) == 0
    assert sum(record.wrong for record in result.records) == 0
    assert not any(record.failed for record in result.records)
    assert (result.leaked_blocks, result.integrity) == (0, [])


def moved(result: SimulationResult, reason: str) -> int:
    return result.migrations.get(reason, {}).get("committed", 0)


def test_a_disaggregated_cluster_serves_every_request() -> None:
    result = simulate(config())

    assert_nothing_is_lost(result)
    assert moved(result, "handoff") > 90


@pytest.mark.parametrize("moves", ["none", "recompute"])
def test_requests_of_engines_that_cannot_move_them_decode_where_they_were_computed(moves: Moves) -> None:
    recomputed = []

    class Counted(RecomputedHandoffs if moves == "recompute" else Simulation):  # type: ignore[misc]
        async def _rest(self) -> tuple[int, list[str]]:
            recomputed.append(sum(i.engine.load().prompt_token_s > 0 for i in self._decoding()))
            return await super()._rest()

        def _decoding(self) -> list[SimulatedInstance]:
            return [i for i in self.cluster.launcher.instances.values() if i.role == "decode"]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        result = runner.run(Counted(config(moves=moves)).run())

    assert_nothing_is_lost(result)
    assert not result.migrations["handoff"].get("committed")
    assert recomputed == [2 if moves == "recompute" else 0]


def test_an_aggregated_cluster_balances_and_serves_every_request() -> None:
    result = simulate(config(instances={"neutral": 3}, requests=workload(200, 12.0)))

    assert_nothing_is_lost(result)
    assert sum(outcomes["committed"] for outcomes in result.migrations.values()) > 0


@pytest.mark.parametrize("policy", ["round-robin", "queue", "p2c", "infaas++", "llumnix-paper", "llumnix"])
@pytest.mark.parametrize("instances", [{"neutral": 3}, {"prefill": 1, "decode": 2}], ids=["neutral", "pd"])
def test_every_policy_set_serves_every_request(policy: str, instances: dict[str, int]) -> None:
    result = simulate(config(policy=policy, instances=instances, requests=workload(60, 10.0, high=0.2)))

    assert_nothing_is_lost(result)


#: Clusters and workloads, by argument.
ANY_CLUSTER = {
    "seed": st.integers(0, 1 << 16),
    "instances": st.sampled_from(
        [{"neutral": 2}, {"prefill": 1, "decode": 2}, {"prefill": 2, "decode": 1, "neutral": 1}]
    ),
    "chunk_tokens": st.sampled_from([None, 128]),
    "prefix_caching": st.booleans(),
    "num_blocks": st.integers(60, 200),
    "rate": st.floats(2.0, 30.0),
}


@given(**ANY_CLUSTER)
@settings(max_examples=8)
def test_no_token_or_block_is_ever_lost(
    seed: int,
    instances: dict[str, int],
    chunk_tokens: int | None,
    prefix_caching: bool,
    num_blocks: int,
    rate: float,
) -> None:
    engine = replace(ENGINE, num_blocks=num_blocks, chunk_tokens=chunk_tokens, prefix_caching=prefix_caching)

    result = simulate(
        config(requests=workload(50, rate, seed, high=0.1), instances=instances, engines={"neutral": engine})
    )

    assert_nothing_is_lost(result)


def test_a_request_that_no_instance_can_hold_fails_alone() -> None:
    requests = [TraceRequest(0.0, 50, 5), TraceRequest(0.1, 100_000, 5), TraceRequest(0.2, 50, 5)]

    result = simulate(config(requests=requests))

    assert [record.failed for record in result.records] == [False, True, False]
    assert (result.leaked_blocks, result.integrity) == (0, [])


def test_a_run_is_a_function_of_its_seed_whatever_python_hashes_with() -> None:
    code = """
import sys
sys.path[:0] = ["tests/unit/pd_serve/simulation"]
from tests.unit.pd_serve.simulation.test_simulate import config, simulate, workload
result = simulate(config(requests=workload(80, 10.0, 3, high=0.1)))
print([(r.first_token_s, r.last_token_s, r.longest_gap_s) for r in result.records], result.migrations)
"""

    def run(hash_seed: str) -> str:
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    first, second = run("1"), run("2")
    assert len(first) > 1000
    assert first == second


def test_another_seed_gives_another_run() -> None:
    ends = [
        [record.last_token_s for record in simulate(config(requests=workload(40, 8.0, seed))).records]
        for seed in (1, 2)
    ]

    assert ends[0] != ends[1]


# ---- faults


def simulate_with(
    wanted: SimulationConfig, fault: Callable[[Simulation], Coroutine[Any, Any, None]]
) -> SimulationResult:
    """Runs with something done to the cluster meanwhile."""

    async def run() -> SimulationResult:
        simulation = Simulation(wanted)
        running = asyncio.ensure_future(simulation.run())
        faults = asyncio.ensure_future(fault(simulation))
        result = await running
        await faults
        return result

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(run())


@pytest.mark.parametrize("victim", ["decode-1", "prefill-0"])
def test_requests_of_a_dead_instance_continue_elsewhere(victim: str) -> None:
    """Its requests are computed again elsewhere, from the tokens that their clients have."""

    async def fault(simulation: Simulation) -> None:
        await asyncio.sleep(4.0)
        await simulation.cluster.kill_instance(victim)

    result = simulate_with(config(instances={"prefill": 2, "decode": 2}), fault)

    assert_nothing_is_lost(result)


@pytest.mark.parametrize("broken_s", [0.3, 5.0, 40.0])
def test_requests_survive_failed_reads_of_an_instance_s_kv(broken_s: float) -> None:
    """Hand-offs to it fail and go elsewhere; what it has, it decodes."""

    async def fault(simulation: Simulation) -> None:
        await asyncio.sleep(4.0)
        fabric = simulation.cluster.network.fabric
        fabric.fail("decode-1")
        await asyncio.sleep(broken_s)
        fabric.restore("decode-1")

    result = simulate_with(config(), fault)

    assert_nothing_is_lost(result)


@pytest.mark.parametrize("victim", ["decode-1", "prefill-0"])
def test_requests_of_a_silent_instance_continue_elsewhere(victim: str) -> None:
    """It hangs, or its network is gone. Its process lives, but sends nothing: the manager ends it."""

    async def fault(simulation: Simulation) -> None:
        await asyncio.sleep(4.0)
        simulation.cluster.network.cut(victim)
        await asyncio.sleep(40.0)
        assert victim not in simulation.cluster.launcher.instances

    result = simulate_with(config(instances={"prefill": 2, "decode": 2}), fault)

    assert_nothing_is_lost(result)
    assert max(record.longest_gap_s for record in result.records) < 60


@pytest.mark.parametrize("victim", ["decode-1", "prefill-0"])
def test_requests_of_an_instance_whose_engine_hangs_continue_elsewhere(victim: str) -> None:
    """Its event loop lives and goes on to report: the manager ends it because its step makes no progress."""
    ended_after: list[float] = []

    async def fault(simulation: Simulation) -> None:
        launcher, loop = simulation.cluster.launcher, asyncio.get_running_loop()
        await asyncio.sleep(2.0)
        while launcher.instances[victim].engine.progress.steps < FIRST_STEPS:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        launcher.instances[victim].faults.hang_s = 1e9
        began = loop.time()
        while victim in launcher.instances:
            await asyncio.sleep(1.0)
            assert loop.time() - began < STEP_S + 10
        ended_after.append(loop.time() - began)

    requests = workload(300, 16.0)
    result = simulate_with(config(instances={"prefill": 2, "decode": 2}, requests=requests), fault)

    assert_nothing_is_lost(result)
    assert ended_after[0] >= STEP_S
    assert max(record.longest_gap_s for record in result.records) < STEP_S + 30


def test_an_idle_cluster_loses_no_instance() -> None:
    requests = [TraceRequest(at, 100, 30, 0, ()) for at in (0.0, 3 * FIRST_STEPS_S)]
    result = simulate(config(requests=requests))

    assert_nothing_is_lost(result)
    assert result.scaling == []


def test_the_manager_starts_another_scheduler_when_one_dies() -> None:
    moved_by_then: list[int] = []

    async def fault(simulation: Simulation) -> None:
        await asyncio.sleep(3.0)
        await simulation.cluster.kill_scheduler()
        moved_by_then.append(num_moved(simulation.cluster.frontend.snapshot().migrations))
        await asyncio.sleep(6.0)
        scheduler = simulation.cluster.frontend.snapshot().scheduler
        assert scheduler is not None
        assert (scheduler.state, scheduler.restarts) == ("alive", 1)

    result = simulate_with(config(instances={"neutral": 3}, requests=workload(240, 10.0)), fault)

    assert_nothing_is_lost(result)
    assert num_moved(result.migrations) > moved_by_then[0] + 1


def num_moved(migrations: dict[str, dict[str, int]]) -> int:
    return sum(outcomes["committed"] for reason, outcomes in migrations.items() if reason != "handoff")


@pytest.mark.parametrize("absent_s", [1.3, 60.7])
def test_an_absent_manager_disturbs_no_request(absent_s: float) -> None:
    async def fault(simulation: Simulation) -> None:
        await asyncio.sleep(4.0)
        await simulation.cluster.kill_manager()
        await asyncio.sleep(absent_s)
        await simulation.cluster.replace_manager()

    undisturbed = simulate(config())
    result = simulate_with(config(), fault)

    assert_nothing_is_lost(result)
    gaps = [max(record.longest_gap_s for record in run.records) for run in (undisturbed, result)]
    assert gaps[1] < gaps[0] + 0.5


def test_an_instance_that_dies_without_a_manager_is_replaced_by_the_next_one() -> None:
    async def fault(simulation: Simulation) -> None:
        cluster = simulation.cluster
        await asyncio.sleep(4.0)
        await cluster.kill_manager()
        await cluster.kill_instance("decode-1")
        await asyncio.sleep(5.0)
        await cluster.replace_manager()
        await asyncio.sleep(30.0)
        assert sorted(cluster.launcher.instances) == ["decode-0", "decode-2", "prefill-0", "prefill-1"]

    result = simulate_with(config(instances={"prefill": 2, "decode": 2}, requests=workload(300, 4.0)), fault)

    assert_nothing_is_lost(result)


def test_messages_of_an_earlier_manager_are_ignored() -> None:
    """It hung, and comes back after another one has taken over. An instance that it never knew stays."""

    async def fault(simulation: Simulation) -> None:
        cluster = simulation.cluster
        await asyncio.sleep(2.0)
        earlier = cluster.manager
        assert earlier is not None
        earlier.keep_notes = asyncio.Event().wait  # type: ignore[assignment]
        await cluster.replace_manager()
        assert cluster.manager is not None
        await asyncio.sleep(1.0)  # the API server hears of it
        await cluster.frontend.scale({"prefill": 2, "decode": 3})
        await asyncio.sleep(20.0)
        earlier.announcer.announce_soon()
        await asyncio.sleep(40.0)
        rows = cluster.frontend.snapshot().instances
        assert len([row for row in rows if row.role == "decode"]) == 3
        await earlier.close()

    result = simulate_with(config(instances={"prefill": 2, "decode": 2}, requests=workload(300, 4.0)), fault)

    assert_nothing_is_lost(result)


# ---- scaling


@pytest.mark.parametrize("scaling", ["freeness", "work"])
def test_the_pool_grows_and_shrinks_with_the_load(scaling: str) -> None:
    burst = workload(150, 25.0)
    tail = [TraceRequest(burst[-1].arrival_s + 5.0 * n, 20, 20) for n in range(1, 60)]

    result = simulate(
        config(
            requests=burst + tail,
            instances={"neutral": 1},
            autoscale={"neutral": PoolBounds(1, 5)},
            policy="llumnix-paper",
            overrides={"scaling": scaling},
            start_instance_s=3.0,
        )
    )

    assert_nothing_is_lost(result)
    counts = [sample.instances for sample in result.samples]
    assert max(counts) >= 3
    assert counts[-1] < max(counts)
    assert len(result.scaling) >= 3
    assert all(reason.count(": ") for _, reason in result.scaling)


def test_slow_links_delay_hand_offs_only() -> None:
    slow = NetworkSettings(kv_bytes_per_s=0.05e9)

    fast_run, slow_run = simulate(config()), simulate(config(network=slow))

    assert_nothing_is_lost(slow_run)
    gaps = [sum(record.longest_gap_s for record in run.records) for run in (fast_run, slow_run)]
    assert gaps[0] < gaps[1]


@pytest.mark.parametrize("instances", [{"prefill": 1, "decode": 1}, {"neutral": 1}])
def test_in_overload_refusals_let_more_requests_meet_their_target(instances: dict[str, int]) -> None:
    """The instances cannot keep up: without refusals nearly all requests wait for too long."""
    slo = Slo(2.0, 1.0)
    crowd = config(requests=workload(300, 8.0), instances=instances)

    def met(result: SimulationResult) -> int:
        served = [one for one in result.records if not one.refused]
        return sum(slo.is_met(one.prefill_s, one.decode_s) for one in served)

    every, chosen = simulate(crowd), simulate(replace(crowd, slo=slo))

    refused = sum(one.refused for one in chosen.records)
    assert not any(one.refused for one in every.records)
    assert 0 < refused < 150
    assert met(chosen) > 1.5 * met(every)
    assert_nothing_is_lost(chosen)
    assert not chosen.leaked_blocks
    assert not chosen.integrity
