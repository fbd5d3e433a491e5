"""Calls of a simulated engine that are delayed or refused."""

import asyncio

import pytest

from migration.errors import DestinationRefusedError, Refusal, RefusalCode
from pd_serve.simulated_engine.faults import EngineFaults
from tests.virtual_time import in_virtual_time

FULL = Refusal(RefusalCode.NO_FREE_BLOCKS, "full")


@in_virtual_time
async def test_a_call_is_delayed_by_its_name() -> None:
    faults = EngineFaults(delays_s={"reserve": 0.5})
    began = asyncio.get_running_loop().time()

    await faults.before("commit")
    assert asyncio.get_running_loop().time() == began
    await faults.before("reserve")
    assert asyncio.get_running_loop().time() == pytest.approx(began + 0.5)


@in_virtual_time
async def test_the_next_call_is_refused_and_the_one_after_it_is_not() -> None:
    faults = EngineFaults()
    faults.refuse_next("commit", FULL)

    with pytest.raises(DestinationRefusedError) as refused:
        await faults.before("commit")
    assert refused.value.refusal == FULL
    await faults.before("commit")


@in_virtual_time
async def test_a_call_can_always_be_refused() -> None:
    faults = EngineFaults(always_refused={"reserve": FULL})

    for _ in range(2):
        with pytest.raises(DestinationRefusedError, match="full"):
            await faults.before("reserve")
