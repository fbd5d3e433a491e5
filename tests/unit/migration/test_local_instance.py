"""The rate of copies of one instance."""

import asyncio
from typing import Any

from migration.bounds import MigrationBounds
from migration.local_instance import LocalInstance, Pacer
from migration.messages import InstanceId
from migration.tasks import BackgroundTasks
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


class SlowReads:
    """Copies take 1 s for each block."""

    async def read(self, peer: str, endpoint: bytes, remote: list[int], local: list[int]) -> int:
        await asyncio.sleep(len(local))
        return len(local)


@in_virtual_time
async def test_copies_from_other_machines_are_measured_apart() -> None:
    transport: Any = SlowReads()
    engine: Any = None
    instance = LocalInstance(
        InstanceId("a"),
        engine,
        transport,
        lambda peer, message: None,
        MigrationBounds(),
        Pacer(None),
        BackgroundTasks(),
        lambda peer: peer == "far",
    )
    await instance.read(InstanceId("near"), b"", [1, 2], [3, 4])
    assert (instance.reads.block_s, instance.far_reads.block_s) == (1.0, 0.0)

    await instance.read(InstanceId("far"), b"", [1], [3])
    assert (instance.reads.block_s, instance.far_reads.block_s) == (1.0, 1.0)
