"""A time in which no instance takes new requests, or none is heard, and whether it is going to end."""

from collections.abc import Callable

from pd_serve.comm.cluster_state import ClusterState
from pd_serve.comm.timing import INSTANCE_LEASE_S, RECOVERY_S


class Outage:
    """Decides whether new requests wait for instances, or are refused.

    They wait, as requests do that have lost their instance, while the manager starts instances in the place
    of those that are missing: clients notice a pause. What has lasted for `RECOVERY_S` is expected to go on.

    An API server that hears neither the manager nor an instance is cut off from them, or they are all dead.
    Its requests wait for as long.

    Args:
        is_serving: Returns whether any instance takes new requests.
        num_staying: Returns the number of instances in reach that are not to be stopped. The manager may be
            about to replace those out of reach.
        state: Returns the last state from the manager; None if there was none.
        silence_s: Returns for how long neither the manager nor an instance has sent anything.
        clock: Seconds.
    """

    def __init__(
        self,
        is_serving: Callable[[], bool],
        num_staying: Callable[[], int],
        state: Callable[[], ClusterState | None],
        silence_s: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self._is_serving = is_serving
        self._num_staying = num_staying
        self._state = state
        self._silence_s = silence_s
        self._clock = clock
        self._began_at: float | None = None

    def look(self) -> None:
        """Notes whether an outage has begun or ended. To be called regularly."""
        if self._is_serving():
            self._began_at = None
        elif self._began_at is None:
            self._began_at = self._clock()

    @property
    def hears_none(self) -> bool:
        """Whether no instance can be said to live."""
        return self._silence_s() >= INSTANCE_LEASE_S

    @property
    def is_cut_off(self) -> bool:
        """Whether neither the manager nor an instance is expected to be heard again."""
        return self._silence_s() >= RECOVERY_S

    def takes_requests(self) -> bool:
        """Whether new requests are served, now or soon."""
        self.look()
        if self.is_cut_off:
            return False
        if self._began_at is None:
            return True
        state = self._state()
        if state is None or self._clock() - self._began_at >= RECOVERY_S:
            return False
        missing = sum(state.wanted.values()) > self._num_staying()
        return bool(state.starting) or (state.replaces and missing)
