"""Load reports of an instance: contents, times and receivers."""

import asyncio

import pytest

from migration.errors import Refusal, RefusalCode
from migration.messages import (
    MigrationId,
    Offer,
    RequestDescription,
    Withdraw,
)
from pd_serve.comm.messages import (
    LoadReport,
    SetDraining,
    SetRole,
)
from pd_serve.comm.timing import INSTANCE_HEARTBEAT_S, MAX_REPORT_INTERVAL_S, REPORT_INTERVAL_S
from pd_serve.instance.load_reporter import BusyShare, report_interval_s
from router.load import EngineLoad
from tests.unit.pd_serve.instance.instance_world import R, World
from tests.virtual_time import in_virtual_time


@in_virtual_time
async def test_a_request_counts_as_added_once_the_engine_has_it() -> None:
    """A report before that does not include its load. A request that the engine rejects counts too."""
    async with World() as world:
        world.engine.held["add"] = asyncio.Event()
        world.add()
        await asyncio.sleep(INSTANCE_HEARTBEAT_S)
        assert world.reports()[-1].load.requests_added == 0
        world.engine.fail["add"] = ValueError("nonsense")
        world.engine.held["add"].set()
        await asyncio.sleep(INSTANCE_HEARTBEAT_S)
        assert world.reports()[-1].load.requests_added == 1


@in_virtual_time
async def test_load_reports_follow_the_engine_at_most_once_per_interval() -> None:
    async with World() as world:
        before = len(world.reports())
        for free in range(100):
            load = EngineLoad(
                total_blocks=100,
                free_blocks=free,
                running=7,
                suspended=2,
                waiting=4,
                waiting_tokens=70,
                head_of_line_blocks=6,
            )
            world.llumlet.events.on_load(load)
        await asyncio.sleep(2.5 * REPORT_INTERVAL_S)
        assert len(world.reports()) == before + 1
        reported = world.reports()[-1].load
        assert (reported.instance_id, reported.role) == ("p0", "prefill")
        assert (reported.total_blocks, reported.free_blocks) == (100, 99)
        assert [getattr(reported, name) for name in load.__struct_fields__] == [
            getattr(load, name) for name in load.__struct_fields__
        ]


@pytest.mark.parametrize(
    ("instances", "interval_s"),
    [(0, REPORT_INTERVAL_S), (16, 0.02), (64, 0.08), (1024, 1.28), (9999, MAX_REPORT_INTERVAL_S)],
)
def test_many_instances_report_less_often(instances: int, interval_s: float) -> None:
    assert report_interval_s(instances) == interval_s


@in_virtual_time
async def test_receivers_get_a_limited_number_of_reports_of_all_instances() -> None:
    async with World() as world:
        world.members(*(f"d{number}" for number in range(159)))
        before = len(world.reports())
        for running in range(100):
            world.llumlet.events.on_load(EngineLoad(running=running))
            await asyncio.sleep(0.01)
        assert len(world.reports()) - before in (5, 6)


@in_virtual_time
async def test_an_idle_instance_reports_with_every_heartbeat() -> None:
    async with World() as world:
        before = len(world.reports())
        await asyncio.sleep(3.5 * INSTANCE_HEARTBEAT_S)
        assert len(world.reports()) == before + 3


@in_virtual_time
async def test_a_report_counts_migrations_under_way() -> None:
    async with World() as world:
        world.add(handoff=["d1"])
        await world.start_prefill()
        assert world.llumlet.reporter.load().migrating_out == 1
        description = RequestDescription(R, [b"payload"], "client", 0, 0, [1], 10, 100, {})
        world.hear("d0", Offer(MigrationId("m"), "test", description, b""))
        await world.settle()
        assert world.llumlet.reporter.load().migrating_in == 1
        world.hear("d0", Withdraw(MigrationId("m"), Refusal(RefusalCode.CANCELLED, "enough")))
        await world.settle()
        assert world.llumlet.reporter.load().migrating_in == 0


@in_virtual_time
async def test_the_scheduler_gets_load_reports_as_soon_as_it_is_a_member() -> None:
    async with World() as world:
        world.members("d0", "d1", scheduler="tcp://scheduler")
        await world.settle()
        assert world.sent(LoadReport, "scheduler") == world.reports()[-1:]
        world.members("d0", "d1", scheduler="tcp://its-successor")
        assert world.wire.peers["scheduler"] == "tcp://its-successor"


@in_virtual_time
async def test_a_change_of_role_is_reported() -> None:
    async with World() as world:
        world.hear("scheduler", SetRole("decode"))
        await world.settle()
        assert world.reports()[-1].load.role == "decode"


@in_virtual_time
async def test_the_scheduler_drains_an_instance_and_uses_it_again() -> None:
    async with World() as world:
        for draining in (True, False):
            world.hear("scheduler", SetDraining(draining))
            await world.settle()
            assert world.reports()[-1].load.draining is draining


@in_virtual_time
async def test_the_scheduler_does_not_use_again_what_the_operator_drains() -> None:
    async with World() as world:
        world.hear("api", SetDraining(True, by_operator=True))
        world.hear("scheduler", SetDraining(False))
        await world.settle()
        assert world.reports()[-1].load.draining
        world.hear("api", SetDraining(False, by_operator=True))
        await world.settle()
        assert not world.reports()[-1].load.draining


@in_virtual_time
async def test_the_manager_gets_a_change_of_draining_or_role_with_the_next_report() -> None:
    """Otherwise it would refuse to drain another instance for up to a second."""
    async with World() as world:
        await asyncio.sleep(10 * INSTANCE_HEARTBEAT_S)
        for order in (
            SetDraining(True, by_operator=True),
            SetDraining(False, by_operator=True),
            SetRole("decode"),
        ):
            world.hear("manager", order)
            await asyncio.sleep(2 * REPORT_INTERVAL_S)
            load = world.sent(LoadReport, "manager")[-1].load
            reporter = world.llumlet.reporter
            assert (load.draining, load.role) == (reporter.draining, reporter.role)
        assert load.role == "decode"


def test_the_busy_share_is_that_of_the_last_seconds() -> None:
    busy = BusyShare()
    assert busy.share(0.0, 0.0) == 0.0
    for second in range(1, 31):
        share = busy.share(float(second), 0.5 * second)
    assert share == pytest.approx(0.5)
    for second in range(31, 42):
        share = busy.share(float(second), 15.0)  # idle since
    assert share == pytest.approx(0.0)
