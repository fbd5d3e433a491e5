"""Processes on one event loop: killed, suspended, and with clocks that jump."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pd_serve.simulation.faults.process_loop import (
    EPOCH_S,
    PROCESS,
    ProcessLoop,
    SimulatedProcess,
    ThawOrder,
    wall_clock,
)


def in_loop(test: Callable[[ProcessLoop], Coroutine[Any, Any, None]]) -> None:
    loop = ProcessLoop()
    loop.run_until_complete(test(loop))
    loop.drop()


async def tick(said: list[float], loop: ProcessLoop) -> None:
    while True:
        said.append(loop.now)
        await asyncio.sleep(1.0)


def test_a_killed_process_does_nothing_more_not_even_its_cleanup() -> None:
    async def test(loop: ProcessLoop) -> None:
        process, said = loop.spawn("a"), []

        async def work() -> None:
            try:
                await asyncio.sleep(100.0)
            finally:
                said.append("cleanup")

        process.start(work())
        await asyncio.sleep(1.0)
        process.kill()
        await asyncio.sleep(200.0)
        assert said == []
        assert not process.is_alive

    in_loop(test)


def test_a_suspended_process_goes_on_where_it_was() -> None:
    async def test(loop: ProcessLoop) -> None:
        process = loop.spawn("a")
        said: list[float] = []
        process.start(tick(said, loop))
        await asyncio.sleep(1.5)
        process.suspend()
        assert process.is_suspended
        assert process.is_alive
        await asyncio.sleep(10.0)
        process.resume()
        await asyncio.sleep(1.2)
        assert said == [0.0, 1.0, 11.5, 12.5]

    in_loop(test)


@pytest.mark.parametrize(
    ("order", "expected"),
    [("timers first", ["timer", "message"]), ("messages first", ["message", "timer"])],
)
def test_what_became_due_while_suspended_is_handled_in_the_given_order(
    order: ThawOrder, expected: list[str]
) -> None:
    async def test(loop: ProcessLoop) -> None:
        process, said = loop.spawn("a"), []
        process.run(loop.call_later, 1.0, said.append, "timer")
        loop.deliver_at(2.0, said.append, "message", context=process.run(_context))
        process.suspend()
        await asyncio.sleep(5.0)
        process.resume(order)
        await asyncio.sleep(0.1)
        assert said == expected

    in_loop(test)


def test_a_clock_that_jumps_makes_timers_of_that_process_due_and_no_others() -> None:
    async def test(loop: ProcessLoop) -> None:
        a, b = loop.spawn("a"), loop.spawn("b")
        said: list[str] = []
        for process in (a, b):
            process.run(loop.call_later, 10.0, said.append, process.name)
        a.jump(9.0)
        await asyncio.sleep(1.5)
        assert said == ["a"]
        assert a.run(loop.time) == loop.now + 9.0
        assert b.run(loop.time) == loop.now
        a.run(loop.call_later, 2.0, said.append, "a later")
        await asyncio.sleep(1.9)
        assert said == ["a"]
        await asyncio.sleep(0.2)
        assert said == ["a", "a later"]

    in_loop(test)


def test_wall_clocks_jump_together_or_one_by_one_and_move_no_timer() -> None:
    async def test(loop: ProcessLoop) -> None:
        a, b = loop.spawn("a"), loop.spawn("b")
        said: list[float] = []
        a.run(loop.call_later, 5.0, said.append, 1)
        a.jump_wall(-600.0)
        loop.jump_wall(60.0)
        await asyncio.sleep(4.0)
        with wall_clock(loop):
            later = loop.spawn("c")
            times = [process.run(time.time) - EPOCH_S for process in (a, b, later)]
            assert later.run(time.time_ns) == int((EPOCH_S + 64.0) * 1e9)
        assert times == [-536.0, 64.0, 64.0]
        assert said == []
        assert time.time() > EPOCH_S + 1e6

    in_loop(test)


def test_what_a_dying_process_has_others_do_happens() -> None:
    async def test(loop: ProcessLoop) -> None:
        process, said = loop.spawn("a"), []

        def die() -> None:
            process.kill()
            loop.call_later(1.0, said.append, "mine")
            loop.outside_at(loop.now + 1.0, said.append, "theirs")

        process.call_soon(die)
        await asyncio.sleep(2.0)
        assert said == ["theirs"]

    in_loop(test)


def test_processes_of_one_name_are_different_ones() -> None:
    async def test(loop: ProcessLoop) -> None:
        first, second = loop.spawn("a"), loop.spawn("a")
        first.kill()
        assert second.is_running
        assert second.run(PROCESS.get) == second.id != first.id

    in_loop(test)


def test_tasks_belong_to_the_process_that_starts_them() -> None:
    async def test(loop: ProcessLoop) -> None:
        process, said = loop.spawn("a"), []

        async def work(process: SimulatedProcess) -> None:
            said.append(PROCESS.get() == process.id)
            task = asyncio.ensure_future(asyncio.sleep(0, PROCESS.get()))
            said.append(await task == process.id)

        await process.start(work(process))
        assert said == [True, True]

    in_loop(test)


def _context() -> Any:
    import contextvars

    return contextvars.copy_context()
