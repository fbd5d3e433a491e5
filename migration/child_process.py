"""Child processes that end with the thread that has started them."""

import ctypes
import multiprocessing
import os
import signal

#: Of prctl(2), which Python does not have.
PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Has the kernel kill this process when the thread that has started it ends, however that happens.

    Holds also while this process is stopped, or in a call that hangs.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it has ended before
        os.kill(os.getpid(), signal.SIGKILL)
