"""Tells the operator when Ray's head does not answer, and when the Ray of a service has ended."""

import asyncio
from collections.abc import Callable

import ray

from pd_serve.errors import PdServeError
from pd_serve.manager.notices import OperatorNotices
from pd_serve.manager.ray_start import ray_lives

#: The head is absent when it has not answered for this long; interval of the questions, in seconds.
ABSENT_S, ASK_INTERVAL_S = 10.0, 5.0

ABSENT = (
    "Ray's head does not answer: requests continue, and no instance is started or replaced. Ray ends this "
    "service when the head stays absent, after RAY_gcs_rpc_server_reconnect_timeout_s (60 s)"
)

ENDED = (
    "Ray has ended, and all instances with it: start the service again; the reason may be in raylet.err or "
    "gcs_server.err in /tmp/ray/session_latest/logs"
)


async def watch_head(notices: OperatorNotices, ask: Callable[[], object] = ray.nodes) -> None:
    """Warns once for each absence of Ray's head, and says when it is back. Runs until cancelled.

    Args:
        ask: A blocking question to the head, which raises an error or waits while it is absent.
    """
    absent = False
    while True:
        asked = asyncio.ensure_future(asyncio.to_thread(ask))
        await asyncio.wait([asked], timeout=ABSENT_S)
        failed = not asked.done() or asked.exception() is not None
        if failed and not absent:
            notices.warn(ABSENT)
        elif absent and not failed:
            notices.step("Ray's head answers again")
        absent = failed
        await asyncio.wait([asked])  # one question at a time: it has a thread
        await asyncio.sleep(ASK_INTERVAL_S)


async def end_with_ray(num_instances: Callable[[], int], lives: Callable[[], bool] = ray_lives) -> None:
    """Runs until cancelled, as long as the Ray that this process has started serves.

    Args:
        num_instances: Returns the number of instances that serve.
        lives: Whether Ray's own processes run.

    Raises:
        PdServeError: Ray has ended, and with it the last instance: none can be started any more.
    """
    while num_instances() or lives():  # noqa: ASYNC110
        await asyncio.sleep(ASK_INTERVAL_S)
    raise PdServeError(ENDED)
