"""The rate of copies of one instance."""

import asyncio

from migration.local_instance import Pacer
from tests.virtual_time import in_virtual_time


@in_virtual_time
async def test_copies_at_the_same_time_share_the_rate() -> None:
    pacer, loop = Pacer(100.0), asyncio.get_running_loop()

    await asyncio.gather(pacer.copied(200), pacer.copied(300))

    assert loop.time() == 5.0


@in_virtual_time
async def test_time_without_copies_is_not_saved_up() -> None:
    pacer, loop = Pacer(100.0), asyncio.get_running_loop()
    await pacer.copied(100)
    await asyncio.sleep(60)
    began = loop.time()

    await pacer.copied(100)

    assert loop.time() == began + 1.0


@in_virtual_time
async def test_without_a_bound_copies_do_not_wait() -> None:
    await Pacer(None).copied(1 << 40)

    assert asyncio.get_running_loop().time() == 0.0
