"""Child processes that end with the thread that has started them."""

import ctypes
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor

#: Of prctl(2), which Python does not have.
PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """The same as `end_with`, in a process of `multiprocessing`."""
    parent = multiprocessing.parent_process()
    end_with(os.getppid() if parent is None or parent.pid is None else parent.pid)


def spawned_pool(number: int) -> ProcessPoolExecutor:
    """A pool of processes that do not outlive the thread that gives them work, where the kernel can end them.

    They are spawned, not forked: the caller may have threads, such as one that draws a progress bar.
    """
    initializer = end_with_parent if sys.platform == "linux" else None
    return ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), initializer)


def end_with(parent: int) -> None:
    """Has the kernel kill this process when the thread that has started it ends, however that happens.

    Holds also while this process is stopped, or in a call that hangs.

    Args:
        parent: Process id of the parent, which may have ended before.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
