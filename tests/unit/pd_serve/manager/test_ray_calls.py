"""Calls to Ray end in time."""

import asyncio
import threading

import pytest
import ray

from pd_serve.errors import EngineDeadError
from pd_serve.manager.ray_calls import in_time, settled


async def test_a_call_that_returns_has_its_result() -> None:
    assert await in_time(lambda: 7) == 7


async def test_a_call_that_does_not_return_in_time_is_an_error() -> None:
    answers, undone = threading.Event(), asyncio.Event()
    with pytest.raises(EngineDeadError, match="Ray has not answered"):
        await in_time(answers.wait, lambda result: undone.set(), limit_s=0.05)
    assert not undone.is_set()
    answers.set()
    await undone.wait()


async def test_the_result_of_a_cancelled_call_is_undone() -> None:
    answers, undone = threading.Event(), asyncio.Event()
    call = asyncio.ensure_future(in_time(answers.wait, lambda result: undone.set()))
    await asyncio.sleep(0)
    call.cancel()
    answers.set()
    await undone.wait()
    assert call.cancelled()


async def test_the_call_of_an_actor_that_has_died_has_no_result() -> None:
    async def call(error: Exception | None) -> int:
        await asyncio.sleep(0)
        if error is not None:
            raise error
        return 7

    assert await settled(call(None)) == 7
    assert await settled(call(ray.exceptions.RayActorError())) is None
    with pytest.raises(KeyError):
        await settled(call(KeyError("x")))
