"""The event loop with a virtual clock."""

import asyncio

import pytest

from pd_serve.simulation.virtual_time import VirtualLoop
from tests.virtual_time import in_virtual_time


@in_virtual_time
async def test_the_clock_advances_by_what_is_slept_and_by_nothing_else() -> None:
    loop = asyncio.get_running_loop()
    for _ in range(100):
        await asyncio.sleep(0)
    assert loop.time() == 0.0

    await asyncio.sleep(86_400.0)

    assert loop.time() == 86_400.0


@in_virtual_time
async def test_timers_of_the_same_time_fire_in_the_order_in_which_they_were_set() -> None:
    loop, fired = asyncio.get_running_loop(), []
    for name, when in (("b", 2.0), ("c", 2.0), ("a", 1.0), ("d", 2.0)):
        loop.call_at(when, fired.append, name)

    await asyncio.sleep(2.0)

    assert fired == ["a", "b", "c", "d"]


@in_virtual_time
async def test_a_cancelled_timer_neither_fires_nor_advances_the_clock() -> None:
    loop, fired = asyncio.get_running_loop(), []
    loop.call_at(1.0, fired.append, "cancelled").cancel()
    loop.call_at(5.0, fired.append, "kept")

    await asyncio.sleep(0.5)
    assert loop.time() == 0.5
    await asyncio.sleep(9.5)

    assert fired == ["kept"]


@in_virtual_time
async def test_a_time_out_ends_a_wait_at_its_time() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(30.0):
            await asyncio.Event().wait()

    assert asyncio.get_running_loop().time() == 30.0


def test_a_callback_that_raises_is_told_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> float:
        loop = asyncio.get_running_loop()
        loop.call_later(1.0, int, "no number")
        await asyncio.sleep(2.0)
        return loop.time()

    loop = VirtualLoop()
    assert loop.run_until_complete(fail()) == 2.0
    loop.close()
    assert "Exception in callback <class 'int'>" in caplog.text
    assert "VirtualHandle when=1.0" in caplog.text


def test_a_wait_that_nothing_can_end_is_an_error() -> None:
    loop = VirtualLoop()

    with pytest.raises(RuntimeError, match="deadlock"):
        loop.run_until_complete(loop.create_future())
    loop.close()
