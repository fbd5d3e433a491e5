"""Starts Ray on this machine: a raylet that ends at once is noticed within seconds, and Ray is started again.

Ray itself waits two minutes for a raylet, whether its process lives or not.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator

import psutil
import ray
from ray._private import services

from pd_serve.errors import PdServeError

logger = logging.getLogger(__name__)

#: Starts of Ray, and the time between two, in seconds.
ATTEMPTS, PAUSE_S = 3, 0.5

#: Interval of looks at the raylet's process, and the times for it to appear and to register, in seconds.
LOOK_S, APPEAR_S, REGISTER_S = 0.5, 5.0, 100.0

#: Maximum wait for the end of processes that a failed start has left, in seconds.
LEFT_S = 3.0

#: Errors of a start that may succeed when it is repeated; a slow node is a bare `Exception`.
#: Source: ray/_private/node.py.
PASSING_ERRORS = (ConnectionError, TimeoutError, RuntimeError, ray.exceptions.RayError, PdServeError)

#: Errors of `ray.init`; an `OSError` is about its folder, `$RAY_TMPDIR` or /tmp.
CONNECT_ERRORS = (*PASSING_ERRORS, ValueError, OSError)


def start_ray(init: Callable[[], object]) -> None:
    """Calls `init`, which starts Ray, up to `ATTEMPTS` times.

    Args:
        init: Calls `ray.init`. Its errors are raised by the last attempt.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _watching_the_raylet():
                init()
        except Exception as error:
            if attempt == ATTEMPTS or not (type(error) is Exception or isinstance(error, PASSING_ERRORS)):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning("Ray has not started (%s); it is started again", reason)
            ray.shutdown()
            end_children(LEFT_S, _is_of_ray)
            time.sleep(PAUSE_S)
        else:
            return


@contextlib.contextmanager
def _watching_the_raylet() -> Iterator[None]:
    """Lets Ray ask for its node only when the raylet has registered, and raises if its process has ended."""
    get_node = services.get_node

    def get_registered_node(gcs_address: str, node_id: str) -> object:
        client = ray._raylet.GcsClient(address=gcs_address)
        began = time.monotonic()
        deadline, seen = began + REGISTER_S, False
        while not _is_registered(client, node_id):
            lives = "raylet" in _living(psutil.Process().children(recursive=True))
            seen = seen or lives
            # Its process has another name until it runs its program, which takes seconds on a busy machine.
            if not lives and (seen or time.monotonic() - began > APPEAR_S):
                raise PdServeError(
                    "its raylet has ended; see raylet.out and raylet.err in Ray's session_latest/logs"
                )
            if time.monotonic() > deadline:
                raise PdServeError(f"its raylet has not registered within {REGISTER_S:g} s")
            time.sleep(LOOK_S)
        return get_node(gcs_address, node_id)

    services.get_node = get_registered_node
    try:
        yield
    finally:
        services.get_node = get_node


def _is_registered(client: "ray._raylet.GcsClient", node_id: str) -> bool:
    return any(found.hex() == node_id for found in client.get_all_node_info(timeout=REGISTER_S))


def ray_lives() -> bool:
    """Whether the raylet and the head that this process has started run."""
    return {"raylet", "gcs_server"} <= _living(psutil.Process().children())


def _living(processes: Iterable[psutil.Process]) -> set[str]:
    """The names of those that have not ended."""
    living = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.add(process.name())
    return living


def _is_of_ray(process: psutil.Process) -> bool:
    home = os.path.dirname(ray.__file__)
    return any(home in argument for argument in process.cmdline())


def end_children(
    timeout_s: float,
    is_meant: Callable[[psutil.Process], bool] = lambda process: True,
    others: Iterable[psutil.Process] = (),
) -> None:
    """Ends child processes by force, those of children too, and waits for their end for a time.

    Python's resource trackers end after the processes that they belong to, whose shared memory they free.

    Args:
        others: Processes that may not be children any more, as their parent has ended.
    """
    found, trackers = [], []
    for process in {*psutil.Process().children(recursive=True), *others}:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if not is_meant(process):
                continue
            if not any("multiprocessing.resource_tracker" in part for part in process.cmdline()):
                process.kill()
                found.append(process)
            elif process.ppid() != os.getpid():
                trackers.append(process)
    psutil.wait_procs(found, timeout=timeout_s)
    for process in psutil.wait_procs(trackers, timeout=timeout_s)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def exit_without_ray(timeout_s: float) -> None:
    """Ends this process with its children. A usual end would wait for threads that wait for Ray's head."""
    logger.error("Ray does not answer; this process ends without it, and Ray's other processes end later")
    end_children(timeout_s)
    os._exit(1)
