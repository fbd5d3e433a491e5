"""Resources used by the present process."""

import resource
import time
from pathlib import Path

from pd_serve.comm.cluster_state import ProcessStats

_STARTED_AT = time.time()
_STATM = Path("/proc/self/statm")


def process_stats() -> ProcessStats:
    """Takes microseconds. Without `/proc`, memory is the maximum so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    try:
        resident = int(_STATM.read_bytes().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        resident = used.ru_maxrss * 1024
    return ProcessStats(used.ru_utime + used.ru_stime, float(resident), _STARTED_AT)
