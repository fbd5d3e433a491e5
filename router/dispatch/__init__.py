"""The instance that a new request starts on. One policy per file, all of them `DispatchPolicy`."""

from router.dispatch.backlog import LeastBacklog
from router.dispatch.dispatch_policy import DispatchPolicy, can_start, candidates
from router.dispatch.freest import Freest
from router.dispatch.prefix import LongestPrefix
from router.dispatch.round_robin import RoundRobin
from router.dispatch.shortest_queue import PowerOfTwo, ShortestQueue
from router.plugins import PolicyKind

__all__ = ["DISPATCH", "DispatchPolicy", "can_start", "candidates"]

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
    },
)
