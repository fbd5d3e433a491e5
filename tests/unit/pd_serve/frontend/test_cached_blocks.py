"""What an API server knows of the prefix caches, whatever happens to the messages."""

import asyncio
import dataclasses
import random
from typing import Any

import pytest
from msgspec.structs import replace

from pd_serve.comm.cached_blocks import CachedBlocks, packed
from pd_serve.comm.timing import CACHE_ASK_INTERVAL_S, CACHE_REPORT_INTERVAL_S, INSTANCE_HEARTBEAT_S
from tests.unit.pd_serve.cached_blocks_world import FORMAT, NAME, World
from tests.virtual_time import in_virtual_time

#: Time in which an API server has what it has missed.
SOON_S = CACHE_ASK_INTERVAL_S + 2 * INSTANCE_HEARTBEAT_S + 5 * CACHE_REPORT_INTERVAL_S


@in_virtual_time
async def test_two_api_servers_know_the_same() -> None:
    world = World("a", "b")
    world.instance.cache.gain(1, 2, 3)
    await asyncio.sleep(SOON_S)
    world.instance.cache.lose(1)
    world.instance.cache.gain(7)
    await asyncio.sleep(SOON_S)

    assert world.known_to("a") == world.known_to("b") == {2, 3, 7}
    assert world.instance.reporter.num_asked == 2
    world.close()


@in_virtual_time
async def test_a_lost_report_is_noticed_by_the_next_one_and_all_is_told_again() -> None:
    world = World("a", "b")
    await asyncio.sleep(SOON_S)
    world.api_servers["a"].loses = lambda message: True
    world.instance.cache.gain(1)
    await asyncio.sleep(INSTANCE_HEARTBEAT_S + CACHE_REPORT_INTERVAL_S)
    world.api_servers["a"].loses = lambda message: False
    world.instance.cache.gain(2)
    await asyncio.sleep(SOON_S)

    assert world.known_to("a") == world.known_to("b") == {1, 2}
    assert sum(report.anew for report in world.api_servers["b"].received) == 1
    world.close()


@in_virtual_time
async def test_the_loss_of_the_last_report_is_noticed_by_the_load_report() -> None:
    world = World("a")
    await asyncio.sleep(SOON_S)
    lost: list[Any] = []

    def loses(message: Any) -> bool:
        lost.append(message)
        return len(lost) < 4  # the report, and twice the question

    world.api_servers["a"].loses = loses
    world.instance.cache.gain(1)
    await asyncio.sleep(3 * SOON_S)

    assert world.known_to("a") == {1}
    world.close()


@in_virtual_time
async def test_an_api_server_that_the_instance_has_forgotten_asks_again() -> None:
    world = World("a")
    await asyncio.sleep(SOON_S)
    world.instance.reporter.reader_left("a")
    await asyncio.sleep(SOON_S)
    other = world.add("b")
    world.instance.cache.gain(5)
    await asyncio.sleep(SOON_S)

    assert world.known_to("a") == world.known_to("b") == {5}
    assert other.follower.is_whole(NAME)
    world.close()


@in_virtual_time
async def test_an_emptied_cache_is_known_as_empty() -> None:
    world = World("a")
    world.instance.cache.gain(1, 2)
    await asyncio.sleep(SOON_S)
    world.instance.cache.empty()
    world.instance.cache.gain(2)
    await asyncio.sleep(SOON_S)

    assert world.known_to("a") == {2}
    world.close()


@in_virtual_time
async def test_reports_that_come_twice_late_or_from_a_former_instance_do_no_harm() -> None:
    world = World("a")
    world.instance.cache.gain(1, 2)
    await asyncio.sleep(SOON_S)
    a = world.api_servers["a"]
    early = list(a.received)
    world.instance.cache.lose(1)
    await asyncio.sleep(SOON_S)
    for report in early:
        a.hear(report)
    assert world.known_to("a") == {2}

    former = world.restart_instance()
    assert world.known_to("a") == set()
    world.instance.cache.gain(9)
    await asyncio.sleep(SOON_S)
    number = world.instance.reporter.number
    for late in (*early, CachedBlocks(former.address, number + 1, packed([4]), packed([9]), True)):
        a.hear(late)
    await asyncio.sleep(SOON_S)

    assert world.known_to("a") == {9}
    assert world.instance.reporter.num_asked == 1
    world.close()


@in_virtual_time
async def test_keys_that_collide_are_followed() -> None:
    """Two blocks of one key: the instance has one of them still when it reports the key as lost."""
    world = World("a")
    cache = world.instance.cache
    cache.gain(1, 2)
    cache.record.gained(1)
    await asyncio.sleep(SOON_S)
    cache.record.lost(1)
    cache.record.lost(1)
    await asyncio.sleep(SOON_S)

    assert world.known_to("a") >= {2}
    assert world.api_servers["a"].follower.is_whole(NAME)
    world.close()


@in_virtual_time
async def test_a_report_that_cannot_be_read_is_a_bug_that_ends_with_the_next_whole_report() -> None:
    world = World("a")
    world.instance.cache.gain(1)
    await asyncio.sleep(SOON_S)
    a = world.api_servers["a"]
    nonsense = CachedBlocks(world.instance.address, world.instance.reporter.number + 1, b"abc", b"")
    with pytest.raises(Exception, match="unpack"):
        a.follower.on_report(NAME, nonsense)
    assert not a.follower.is_whole(NAME)
    await asyncio.sleep(SOON_S)
    world.instance.cache.gain(2)
    await asyncio.sleep(SOON_S)

    assert world.known_to("a") == {1, 2}
    world.close()


@in_virtual_time
async def test_an_instance_with_keys_of_another_format_is_not_asked() -> None:
    world = World("a")
    a = world.api_servers["a"]
    assert a.follower.format == FORMAT
    info = a.members.instances[NAME]
    facts = dataclasses.replace(info.engine, key_format=FORMAT._replace(key_tokens=32))
    other = dataclasses.replace(info, instance_id="p0", engine=facts)
    assert a.members.latest is not None
    a.members.update(replace(a.members.latest, instances=[other, info]))
    a.follower.on_load("p0", 3)
    await asyncio.sleep(SOON_S)

    assert a.follower.format == FORMAT
    assert not a.follower.is_whole("p0")
    assert a.index.key_tokens == 16
    world.close()


@in_virtual_time
async def test_without_a_policy_that_needs_it_no_instance_is_asked() -> None:
    world = World("a")
    world.api_servers["a"].index.is_used = False
    await asyncio.sleep(SOON_S)

    assert world.api_servers["a"].follower.format is None
    assert world.instance.reporter.num_asked == 0
    world.close()


@pytest.mark.parametrize("seed", range(20))
def test_after_any_losses_and_delays_all_know_what_is_there(seed: int) -> None:
    @in_virtual_time
    async def run() -> None:
        dice = random.Random(seed)
        world = World("a", "b")
        loop = asyncio.get_running_loop()
        for api_server in world.api_servers.values():
            api_server.loses = lambda message: dice.random() < 0.3
            hear = api_server.hear

            def delivered(message: CachedBlocks, hear: Any = hear) -> None:
                loop.call_later(dice.choice((0.0, 0.0, 0.0, 0.3)), hear, message)
                if dice.random() < 0.2:
                    loop.call_later(dice.random() * 3, hear, message)

            api_server.hear = delivered  # type: ignore[method-assign]
        for _ in range(300):
            cache = world.instance.cache
            match dice.randrange(8):
                case 0:
                    cache.empty()
                case 1 | 2 | 3 if cache.keys:
                    cache.lose(*dice.sample(sorted(cache.keys), dice.randrange(1, len(cache.keys) + 1)))
                case _:
                    new = {dice.randrange(1000) for _ in range(5)} - cache.keys
                    cache.gain(*sorted(new))
            if dice.random() < 0.01:
                world.restart_instance()
            if dice.random() < 0.02:
                world.instance.reporter.reader_left(dice.choice("ab"))
            await asyncio.sleep(dice.random() / 3)
        for api_server in world.api_servers.values():
            api_server.loses = lambda message: False
        await asyncio.sleep(3 * SOON_S)
        assert world.known_to("a") == world.known_to("b") == world.instance.cache.keys
        world.close()

    run()
