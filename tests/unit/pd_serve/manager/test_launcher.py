"""Orders to start an instance that are lost, late or refused."""

import asyncio

import pytest

from pd_serve.comm.timing import START_ORDER_S
from pd_serve.errors import EngineDeadError
from pd_serve.manager.launcher import answered
from tests.members import instance_info
from tests.virtual_time import in_virtual_time

READY = instance_info("decode-0")


class Instance:
    """Starts in a time; only the last of some orders is answered."""

    def __init__(self, lost: int, start_s: float = 2.0) -> None:
        self.orders = 0
        self.waiting = 0
        self._lost = lost
        self._start_s = start_s

    async def start(self) -> object:
        self.orders += 1
        self.waiting += 1
        try:
            await asyncio.sleep(self._start_s)
            return READY if self.orders > self._lost else await asyncio.Future()
        finally:
            self.waiting -= 1


@pytest.mark.parametrize("lost", [0, 1, 3])
@in_virtual_time
async def test_an_order_without_an_answer_is_repeated(lost: int) -> None:
    instance = Instance(lost)
    began = asyncio.get_running_loop().time()

    assert await answered(instance.start) == READY  # type: ignore[arg-type]

    assert asyncio.get_running_loop().time() - began == lost * START_ORDER_S + 2.0
    await asyncio.sleep(0)
    assert (instance.orders, instance.waiting) == (lost + 1, 0)


@in_virtual_time
async def test_a_slow_start_is_waited_for_and_every_answer_is_taken_as_one() -> None:
    instance = Instance(0, start_s=START_ORDER_S)  # the second order comes at the time of the first answer

    assert await answered(instance.start) == READY  # type: ignore[arg-type]


@in_virtual_time
async def test_a_refused_order_is_not_repeated() -> None:
    orders = []

    async def fail() -> None:
        orders.append(1)
        raise EngineDeadError("no such model")

    with pytest.raises(EngineDeadError, match="no such model"):
        await answered(fail)  # type: ignore[arg-type]
    assert len(orders) == 1


@in_virtual_time
async def test_a_cancelled_start_is_ordered_no_more() -> None:
    instance = Instance(99)
    start = asyncio.ensure_future(answered(instance.start))  # type: ignore[arg-type]
    await asyncio.sleep(2.5 * START_ORDER_S)
    start.cancel()
    await asyncio.wait([start])
    await asyncio.sleep(5 * START_ORDER_S)

    assert (instance.orders, instance.waiting) == (3, 0)
