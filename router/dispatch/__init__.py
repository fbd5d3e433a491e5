"""Where a new request starts. One policy per file, all behind `DispatchPolicy`."""

from router.dispatch.backlog import LeastBacklog
from router.dispatch.dispatch_policy import DispatchPolicy, can_start, candidates
from router.dispatch.freest import Freest
from router.dispatch.power_of_two import PowerOfTwo
from router.dispatch.prefix import LongestPrefix
from router.dispatch.queue_length import ShortestQueue
from router.dispatch.round_robin import RoundRobin
from router.policies import DispatchName

__all__ = ["DISPATCH_POLICIES", "DispatchPolicy", "can_start", "candidates"]

DISPATCH_POLICIES: dict[DispatchName, type[DispatchPolicy]] = {
    "round-robin": RoundRobin,
    "queue": ShortestQueue,
    "p2c": PowerOfTwo,
    "freest": Freest,
    "backlog": LeastBacklog,
    "prefix": LongestPrefix,
}
