"""Recomputes requests that were lost with their instance, as soon as there is a place for them."""

import asyncio
from collections.abc import Callable

from migration.messages import RequestId
from pd_serve.comm.timing import POLL_S, RECOVERY_S
from pd_serve.frontend.placement import RequestPlacement
from pd_serve.frontend.suspects import Suspects
from pd_serve.frontend.tracked_request import TrackedRequest


class Recovery:
    """Requests that were lost, and new ones that no instance takes.

    A request waits here while no instance takes requests, or until its trial may begin (see `Suspects`): for
    at most `RECOVERY_S`.

    Args:
        on_placed: Called with each request that has been sent to an instance.
        on_given_up: Called with each request that has found no instance in time.
    """

    def __init__(
        self,
        placement: RequestPlacement,
        suspects: Suspects,
        on_placed: Callable[[TrackedRequest], None],
        on_given_up: Callable[[TrackedRequest], None],
    ) -> None:
        self._placement = placement
        self._suspects = suspects
        self._on_placed = on_placed
        self._on_given_up = on_given_up
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[RequestId, tuple[TrackedRequest, float]] = {}  # since when
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def add(self, request: TrackedRequest) -> None:
        """Places a request now, or as soon as possible."""
        now = self._loop.time()
        if self._place(request, now, overdue=False):
            self._on_placed(request)
            return
        self._waiting[request.request_id] = request, now
        if self._timer is None:
            self._timer = self._loop.call_later(POLL_S, self._place_all)

    def discard(self, request_id: RequestId) -> None:
        """Removes a request that has ended."""
        self._waiting.pop(request_id, None)

    def _place_all(self) -> None:
        self._timer = None
        now = self._loop.time()
        for request, since in list(self._waiting.values()):
            overdue = now - since >= RECOVERY_S
            placed = self._place(request, now, overdue=overdue)
            if placed or overdue:
                del self._waiting[request.request_id]
                (self._on_placed if placed else self._on_given_up)(request)
        if self._waiting:
            self._timer = self._loop.call_later(POLL_S, self._place_all)

    def _place(self, request: TrackedRequest, now: float, *, overdue: bool) -> bool:
        if now < request.retry_at or not self._placement.is_serving:
            return False
        if request.is_new:
            return self._placement.start(request)
        on_trial = not overdue and self._suspects.needs_trial(request)
        avoided = self._suspects.instances_with_trials() if on_trial else set()
        if not self._placement.place(request, avoid=avoided):
            return False
        request.recomputed_at = now
        if on_trial:
            self._suspects.begin_trial(request)
        return True
