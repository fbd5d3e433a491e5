"""Calls to Ray and its actors that end in time, or without a result."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import ray

from pd_serve.comm.timing import RAY_CALL_S
from pd_serve.errors import EngineDeadError

logger = logging.getLogger(__name__)

T = TypeVar("T")


async def in_time(
    call: Callable[[], T], undo: Callable[[T], object] = lambda result: None, limit_s: float = RAY_CALL_S
) -> T:
    """The result of a blocking call to Ray, which waits without end while Ray's head is absent.

    Args:
        undo: Called with a result that nobody waits for any more.

    Raises:
        EngineDeadError: Ray does not answer.
    """
    running = asyncio.ensure_future(asyncio.to_thread(call))

    def on_late(ended: "asyncio.Future[T]") -> None:
        if not ended.cancelled() and ended.exception() is None:
            undo(ended.result())

    try:
        async with asyncio.timeout(limit_s):
            return await asyncio.shield(running)
    except (TimeoutError, asyncio.CancelledError) as error:
        running.add_done_callback(on_late)
        if isinstance(error, asyncio.CancelledError):
            raise
        raise EngineDeadError(f"Ray has not answered for {limit_s:.0f} s") from error


async def settled(reference: Any) -> Any:
    """The result of a call of an actor; None if the actor has died."""
    try:
        return await reference
    except ray.exceptions.RayError as error:
        logger.debug("an actor has ended before it answered: %s", error)
        return None
