"""Resources used by the present process."""

import resource
import time
from functools import lru_cache
from pathlib import Path

from pd_serve.comm.cluster_state import ProcessStats

_STARTED_AT = time.time()
_STATM = Path("/proc/self/statm")


#: How often they are read, at most: all instances of a simulation are one process.
READS_PER_S = 10


def process_stats() -> ProcessStats:
    """Takes microseconds. Without `/proc`, memory is the maximum so far."""
    return _read(int(time.monotonic() * READS_PER_S))


@lru_cache(maxsize=1)
def _read(moment: int) -> ProcessStats:
    used = resource.getrusage(resource.RUSAGE_SELF)
    try:
        resident = int(_STATM.read_bytes().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        resident = used.ru_maxrss * 1024
    return ProcessStats(used.ru_utime + used.ru_stime, float(resident), _STARTED_AT)
