"""The instance that a new request starts on. All policies are `DispatchPolicy`."""

from router.dispatch.dispatch_policy import STARTING, DispatchPolicy, can_start, candidates
from router.dispatch.least_loaded import Freest, LeastBacklog, PowerOfTwo, ShortestQueue
from router.dispatch.prefix import LongestPrefix
from router.dispatch.round_robin import RoundRobin
from router.dispatch.soonest import Soonest
from router.plugins import PolicyKind

__all__ = ["DISPATCH", "STARTING", "DispatchPolicy", "can_start", "candidates"]

DISPATCH: PolicyKind[DispatchPolicy] = PolicyKind(
    "dispatch",
    "choose",
    {
        "round-robin": RoundRobin,
        "queue": ShortestQueue,
        "p2c": PowerOfTwo,
        "freest": Freest,
        "backlog": LeastBacklog,
        "prefix": LongestPrefix,
        "soonest": Soonest,
    },
)
