"""Blocks that a failed read may still write to."""

import asyncio

from migration.transport.quarantine import Quarantine


async def test_blocks_are_held_until_their_read_is_quiet() -> None:
    quarantine, quiet = Quarantine(), asyncio.get_running_loop().create_future()
    quarantine.add([3, 4], quiet)
    assert quarantine.holds([1, 4])
    assert not quarantine.holds([1, 2])
    assert quarantine.problems() == ["2 KV blocks wait until no failed read writes to them"]
    waiting = asyncio.create_task(quarantine.wait_for([4, 5]))
    await asyncio.sleep(0)
    assert not waiting.done()
    quiet.set_result(None)
    await waiting
    assert not quarantine.holds([3, 4])
    assert quarantine.problems() == []


async def test_a_block_of_two_reads_is_held_until_both_are_quiet() -> None:
    quarantine = Quarantine()
    first, second = (asyncio.get_running_loop().create_future() for _ in range(2))
    quarantine.add([3], first)
    quarantine.add([3, 4], second)
    waiting = asyncio.create_task(quarantine.wait_for([3]))
    first.set_result(None)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    second.set_result(None)
    await waiting


async def test_other_blocks_wait_for_nothing() -> None:
    quarantine = Quarantine()
    quarantine.add([3], asyncio.get_running_loop().create_future())
    await quarantine.wait_for([1, 2])
