"""A whole cluster whose manager, API server and network fail so that two sides have different views."""

import asyncio
import random

import pytest

from migration.messages import Committed
from pd_serve.comm.messages import AbortRequests, AddRequest, Heartbeat, MigrationEnded, RequestReport
from pd_serve.comm.timing import API_SERVER_LEASE_S, INSTANCE_LEASE_S, RECOVERY_S
from pd_serve.simulated_engine.outputs import SimulatedBatch
from pd_serve.simulation.config import TraceRequest
from pd_serve.simulation.message_faults import MessageFaults
from pd_serve.simulation.result import SimulationResult
from pd_serve.simulation.simulate import Simulation
from router.scaling import PoolBounds
from tests.unit.pd_serve.simulation.test_simulate import (
    assert_nothing_is_lost,
    config,
    simulate_with,
    workload,
)


def late_workload(count: int, begin_s: float) -> list[TraceRequest]:
    dice = random.Random(0)
    return [
        TraceRequest(begin_s + n / 4, dice.randrange(1, 300), dice.randrange(1, 90)) for n in range(count)
    ]


def test_a_manager_that_finds_no_instance_starts_some_and_is_followed() -> None:
    """Its predecessor had taken over from another one; then everything died but the API server."""

    async def fault(simulation: Simulation) -> None:
        cluster = simulation.cluster
        await asyncio.sleep(2.0)
        await cluster.kill_manager()
        await cluster.replace_manager()
        await asyncio.sleep(2.0)
        await cluster.kill_manager()
        for name in list(cluster.launcher.instances):
            await cluster.kill_instance(name)
            cluster.network.restore(name)  # the next one of this id is another process
        await cluster.replace_manager()
        assert cluster.manager is not None
        await cluster.manager.start()
        await asyncio.sleep(10.0)
        assert cluster.frontend.snapshot().manager == "alive"

    assert_nothing_is_lost(simulate_with(config(requests=late_workload(50, 20.0)), fault))


def test_an_order_to_stop_an_instance_outlives_the_manager() -> None:
    async def fault(simulation: Simulation) -> None:
        cluster = simulation.cluster
        await asyncio.sleep(4.0)
        await cluster.frontend.drain("decode-0", stop=True)
        await cluster.kill_manager()
        await asyncio.sleep(1.0)
        await cluster.replace_manager()
        await asyncio.sleep(20.0)
        assert sorted(cluster.launcher.instances) == ["decode-1", "prefill-0"]

    assert_nothing_is_lost(simulate_with(config(requests=workload(200, 4.0)), fault))


def test_requests_of_an_api_server_that_the_manager_did_not_hear_go_on() -> None:
    """The manager has dropped it, and so the instances have ended its requests."""

    async def fault(simulation: Simulation) -> None:
        faults = simulation.cluster.network.faults = MessageFaults()
        await asyncio.sleep(10.0)
        faults.lose_between("api", "manager")
        await asyncio.sleep(API_SERVER_LEASE_S + 10.0)
        faults.heal()

    assert_nothing_is_lost(simulate_with(config(requests=workload(300, 4.0)), fault))


def test_a_manager_that_was_cut_off_from_all_others_ends_none_of_them() -> None:
    """It has heard of no instance for longer than their leases, and could still end their processes."""

    async def fault(simulation: Simulation) -> None:
        cluster = simulation.cluster
        faults = cluster.network.faults = MessageFaults()
        await asyncio.sleep(5.0)
        before = sorted(cluster.launcher.instances)
        faults.isolate("manager")
        await asyncio.sleep(2 * INSTANCE_LEASE_S)
        faults.heal()
        await asyncio.sleep(5.0)
        assert sorted(cluster.launcher.instances) == before
        assert cluster.frontend.snapshot().manager == "alive"

    assert_nothing_is_lost(simulate_with(config(requests=workload(320, 4.0)), fault))


def assert_some_fail_until(back_at_s: float, result: SimulationResult) -> None:
    """Requests from before this time fail, later ones do not, and nothing is wrong or left."""
    failed = [record.request.arrival_s for record in result.records if record.failed]
    assert failed
    assert max(failed) < back_at_s
    assert sum(record.duplicated + record.wrong for record in result.records) == 0
    assert (result.leaked_blocks, result.integrity) == (0, [])


def test_an_api_server_that_is_cut_off_for_long_ends_its_requests_and_serves_later_ones() -> None:
    """Clients would wait for as long as it is cut off. What the instances have is ended when it is back."""
    cut_at_s, back_at_s = 5.0, 5.0 + RECOVERY_S + 30.0

    async def fault(simulation: Simulation) -> None:
        cluster = simulation.cluster
        faults = cluster.network.faults = MessageFaults()
        await asyncio.sleep(cut_at_s)
        faults.isolate("api")
        await asyncio.sleep(RECOVERY_S + 2.0)
        assert cluster.frontend.requests.requests == {}
        await asyncio.sleep(back_at_s - RECOVERY_S - 2.0 - cut_at_s)
        faults.heal()

    requests = [*workload(40, 8.0), *late_workload(50, back_at_s + 5.0)]
    result = simulate_with(config(requests=requests), fault)

    assert_some_fail_until(back_at_s, result)


def test_an_api_server_that_hears_no_instance_ends_its_requests_and_serves_later_ones() -> None:
    cut_at_s, back_at_s = 5.0, 5.0 + INSTANCE_LEASE_S + RECOVERY_S + 30.0

    async def fault(simulation: Simulation) -> None:
        cluster = simulation.cluster
        faults = cluster.network.faults = MessageFaults()
        await asyncio.sleep(cut_at_s)
        for name in cluster.launcher.instances:
            faults.lose_between("api", name)
        await asyncio.sleep(INSTANCE_LEASE_S + 5.0)
        assert cluster.frontend.num_live == 0
        assert {row.state for row in cluster.frontend.snapshot().instances} == {"unreachable"}
        await asyncio.sleep(RECOVERY_S)
        assert cluster.frontend.requests.requests == {}
        await asyncio.sleep(back_at_s - cut_at_s - INSTANCE_LEASE_S - 5.0 - RECOVERY_S)
        faults.heal()

    requests = [*workload(40, 8.0), *late_workload(50, back_at_s + 5.0)]
    result = simulate_with(config(requests=requests), fault)

    assert_some_fail_until(back_at_s, result)


def test_the_death_of_the_only_prefill_instance_costs_a_pause() -> None:
    """Its queue, and what it was prefilling, goes to decode instances until the next one has started."""

    async def fault(simulation: Simulation) -> None:
        cluster = simulation.cluster
        await asyncio.sleep(4.0)
        await cluster.kill_instance("prefill-0")
        await asyncio.sleep(0.2)
        await cluster.kill_instance("decode-1")

    result = simulate_with(config(requests=workload(200, 12.0)), fault)

    assert_nothing_is_lost(result)


def test_the_death_of_every_instance_costs_a_pause() -> None:
    """Clients that have come before are served by the next instances; new ones are refused meanwhile."""

    async def fault(simulation: Simulation) -> None:
        cluster = simulation.cluster
        await asyncio.sleep(5.0)
        for name in list(cluster.launcher.instances):
            await cluster.kill_instance(name)

    requests = [request for request in workload(60, 12.0) if request.arrival_s < 5.0]
    assert_nothing_is_lost(simulate_with(config(requests=requests), fault))
    aggregated = config(requests=requests, instances={"neutral": 2})
    assert_nothing_is_lost(simulate_with(aggregated, fault))


def test_a_request_that_ends_its_instances_fails_alone() -> None:
    async def fault(simulation: Simulation) -> None:
        cluster = simulation.cluster
        await asyncio.sleep(0.5)  # all have come
        while "5" in cluster.frontend.requests.requests:
            await asyncio.sleep(0.01)
            for name, instance in list(cluster.launcher.instances.items()):
                if "5" in await instance.engine.live_requests(cluster.frontend._placement._token_endpoint):
                    await cluster.kill_instance(name)

    for instances in ({"prefill": 1, "decode": 2}, {"neutral": 2}):
        result = simulate_with(config(requests=workload(30, 100.0), instances=instances), fault)
        failed = [number for number, record in enumerate(result.records) if record.failed]
        assert failed == [5]
        assert sum(record.lost + record.duplicated + record.wrong for record in result.records) == 0


def test_an_autoscaled_pool_that_has_lost_its_instances_starts_one_until_it_reports() -> None:
    """Nothing shows before that another one is needed."""

    async def fault(simulation: Simulation) -> None:
        cluster = simulation.cluster
        await asyncio.sleep(5.0)
        for name in list(cluster.launcher.instances):
            await cluster.kill_instance(name)

    requests = [*(r for r in workload(40, 8.0) if r.arrival_s < 4.5), *late_workload(40, 30.0)]
    scaled = config(requests=requests, instances={"neutral": 2}, autoscale={"neutral": PoolBounds(1, 16)})
    result = simulate_with(scaled, fault)
    assert_nothing_is_lost(result)
    assert len([what for at_s, what in result.scaling if at_s < 30.0]) == 1


def test_neutral_instances_beside_prefill_and_decode_ones_get_their_share() -> None:
    added: dict[str, int] = {}

    async def look(simulation: Simulation) -> None:
        await asyncio.sleep(15.0)
        for name, instance in simulation.cluster.launcher.instances.items():
            assert instance.llumlet.coordinator is not None
            added[name] = instance.llumlet.reporter.requests_added + instance.llumlet.coordinator.num_offers

    mixed = config(requests=workload(300, 20.0), instances={"prefill": 1, "decode": 1, "neutral": 2})
    assert_nothing_is_lost(simulate_with(mixed, look))
    assert all(added[name] > 20 for name in ("prefill-0", "neutral-0", "neutral-1")), added


# ---- lost, doubled and late messages

LAYOUTS: list[dict[str, int]] = [
    {"prefill": 1, "decode": 2},
    {"neutral": 3},
    {"prefill": 2, "decode": 1, "neutral": 1},
]

#: Longest pause of a stream while messages are lost: three times what asking for tokens twice takes.
MAX_PAUSE_S = 15.0


def under_message_faults(seed: int, loss: float, doubled: float, late: float) -> SimulationResult:
    """A run in which any message of any process may be lost, come twice, or be late and overtaken."""
    dice = random.Random(seed)

    async def fault(simulation: Simulation) -> None:
        await asyncio.sleep(0.5)
        faults = simulation.cluster.network.faults = MessageFaults()
        faults.is_lost = lambda: dice.random() < loss
        faults.is_doubled = lambda: dice.random() < doubled
        faults.delay_s = lambda: dice.random() / 2 if dice.random() < late else 0.0
        await simulation.all_ended.wait()
        faults.heal()

    layout = LAYOUTS[seed % len(LAYOUTS)]
    return simulate_with(config(requests=workload(40, 8.0, seed), instances=layout), fault)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("loss", [0.001, 0.005, 0.02])
def test_no_lost_message_stops_or_changes_a_stream(loss: float, seed: int) -> None:
    result = under_message_faults(seed, loss, doubled=0.01 * (seed % 2), late=0.02 * (seed // 2 % 2))

    assert_nothing_is_lost(result)
    assert max(record.longest_gap_s for record in result.records) < MAX_PAUSE_S


@pytest.mark.parametrize(
    "kind", [AddRequest, AbortRequests, MigrationEnded, SimulatedBatch, RequestReport, Heartbeat, Committed]
)
@pytest.mark.parametrize("seed", range(2))
def test_no_kind_of_message_is_needed_every_time(kind: type, seed: int) -> None:
    dice = random.Random(seed)

    async def fault(simulation: Simulation) -> None:
        await asyncio.sleep(0.5)
        faults = simulation.cluster.network.faults = MessageFaults()
        while not simulation.all_ended.is_set():
            faults.lose(kind, times=dice.randrange(2))
            await asyncio.sleep(0.5 + dice.random())
        faults.heal()

    assert_nothing_is_lost(simulate_with(config(requests=workload(40, 8.0, seed)), fault))


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_requests_of_an_instance_that_only_the_manager_hears_go_on_elsewhere(name: str) -> None:
    async def fault(simulation: Simulation) -> None:
        faults = simulation.cluster.network.faults = MessageFaults()
        await asyncio.sleep(3.0)
        before = sorted(simulation.cluster.launcher.instances)
        faults.lose_between("api", name)
        await simulation.all_ended.wait()
        assert sorted(simulation.cluster.launcher.instances) == before  # one party's bad link is its own
        faults.heal()
        await asyncio.sleep(5.0)

    layout = {"prefill": 2, "decode": 2}
    assert_nothing_is_lost(simulate_with(config(requests=workload(40, 8.0), instances=layout), fault))
