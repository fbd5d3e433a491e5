"""Background tasks: cancelled together, and their failures reported."""

import asyncio

import pytest

from migration.tasks import BackgroundTasks, Timer, settle
from tests.virtual_time import in_virtual_time


async def fail() -> None:
    raise KeyError("a bug")


async def test_a_failure_is_reported_and_a_cancelled_task_is_no_failure() -> None:
    failures: list[BaseException] = []
    tasks = BackgroundTasks(failures.append)
    tasks.start(fail())
    tasks.start(asyncio.sleep(1000))
    await asyncio.sleep(0.01)
    assert len(tasks) == 1

    await tasks.cancel()

    assert len(tasks) == 0
    assert [str(failure) for failure in failures] == ["'a bug'"]


async def test_without_a_callback_a_failure_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    await asyncio.gather(BackgroundTasks().start(fail()), return_exceptions=True)

    assert "background task failed" in caplog.text
    assert "a bug" in caplog.text


async def test_cancelling_waits_until_every_task_has_ended() -> None:
    ended: list[str] = []

    async def end_slowly() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(0.01)
            ended.append("slowly")

    tasks = BackgroundTasks()
    tasks.start(end_slowly())
    await asyncio.sleep(0)

    await tasks.cancel()

    assert ended == ["slowly"]


async def test_a_future_is_settled_once_and_never_after_it_was_cancelled() -> None:
    loop = asyncio.get_running_loop()
    first, failed, cancelled = loop.create_future(), loop.create_future(), loop.create_future()
    cancelled.cancel()

    settle(first, 1)
    settle(first, 2)
    settle(failed, KeyError("a bug"))
    settle(cancelled, 1)

    assert first.result() == 1
    assert isinstance(failed.exception(), KeyError)
    assert cancelled.cancelled()


@in_virtual_time
async def test_a_timer_fires_once_after_the_delay_that_was_set_last() -> None:
    loop = asyncio.get_running_loop()
    fired: list[float] = []
    timer = Timer(lambda: fired.append(loop.time()))

    timer.set(5.0)
    await asyncio.sleep(4.0)
    timer.set(5.0)
    await asyncio.sleep(100.0)
    timer.set(5.0)
    timer.set(None)
    await asyncio.sleep(100.0)

    assert fired == [9.0]
