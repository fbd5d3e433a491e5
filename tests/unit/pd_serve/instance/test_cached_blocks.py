"""What an instance tells of its prefix cache, and to whom."""

import asyncio

from pd_serve.comm.cached_blocks import unpacked
from pd_serve.comm.timing import CACHE_REPORT_INTERVAL_S, INSTANCE_HEARTBEAT_S
from pd_serve.instance.cached_blocks import MAX_KEYS
from tests.unit.pd_serve.cached_blocks_world import World
from tests.virtual_time import in_virtual_time


@in_virtual_time
async def test_an_instance_that_no_api_server_follows_records_and_sends_nothing() -> None:
    world = World("a")
    world.api_servers["a"].index.is_used = False
    world.instance.cache.gain(1, 2)
    await asyncio.sleep(10)

    assert world.instance.cache.record.is_new
    assert world.instance.reporter.number == 0
    assert not world.api_servers["a"].received
    world.close()


@in_virtual_time
async def test_a_large_cache_is_told_in_bounded_messages_at_a_bounded_rate() -> None:
    """Half a million blocks, to an API server that comes late, while blocks come and go."""
    world = World("a")
    cache = world.instance.cache
    cache.gain(*range(500_000))
    a = world.api_servers["a"]
    await asyncio.sleep(130 * CACHE_REPORT_INTERVAL_S + 1)
    assert world.known_to("a") == cache.keys
    b = world.add("b")
    for first in range(0, 10_000, 100):
        cache.lose(*range(first, first + 100))
        cache.gain(*range(500_000 + first, 500_000 + first + 100))
        await asyncio.sleep(CACHE_REPORT_INTERVAL_S)
    await asyncio.sleep(40 * CACHE_REPORT_INTERVAL_S)

    assert world.known_to("a") == world.known_to("b") == cache.keys
    for report in a.received + b.received:
        assert len(report.gained) + len(report.lost) <= 2 * 8 * MAX_KEYS
    assert a.received[0].anew
    assert sum(report.anew for report in a.received) == 1, "the first one has to start again for the second"
    world.close()


@in_virtual_time
async def test_nothing_is_kept_for_an_api_server_that_is_gone() -> None:
    world = World("a")
    await asyncio.sleep(2)
    assert set(world.instance.reporter._readers) == {"a"}
    world.instance.reporter.reader_left("a")
    world.instance.reporter.on_asked("stranger")

    assert not world.instance.reporter._readers
    world.close()


@in_virtual_time
async def test_an_instance_at_rest_sends_no_reports() -> None:
    world = World("a")
    world.instance.cache.gain(*range(10))
    await asyncio.sleep(10 * INSTANCE_HEARTBEAT_S)
    number = world.instance.reporter.number
    await asyncio.sleep(100 * INSTANCE_HEARTBEAT_S)

    assert world.instance.reporter.number == number
    assert world.instance.reporter.num_keys == 10
    assert world.instance.reporter.num_asked == 1
    world.close()


@in_virtual_time
async def test_changes_are_told_in_the_order_in_which_they_can_be_applied() -> None:
    world = World("a")
    world.instance.cache.gain(1, 2, 3)
    await asyncio.sleep(2)
    world.instance.cache.lose(2)
    world.instance.cache.gain(4)
    await asyncio.sleep(2)
    last = world.api_servers["a"].received[-1]

    assert (unpacked(last.gained), unpacked(last.lost), last.anew) == ((4,), (2,), False)
    world.close()
