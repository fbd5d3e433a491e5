"""Which requests may have ended the instances that they ran on.

A request can end its instance, for example by a defect of a kernel that only its tokens reach. Recomputed
elsewhere, it would end one instance after another, with the requests beside it. So the deaths that each
request has seen are counted, and a request that has seen two is recomputed on trial: without another such
request on the same instance. Whatever ends the instance then is blamed on it alone.

A request that goes on for `PROGRESS_TOKENS` after a recompute has passed what it may have died of, and the
next death counts as its first one. If that happens again and again, its trials last until it has come further
than the last time.
"""

import asyncio
from collections.abc import Collection, Mapping

from migration.messages import RequestId
from pd_serve.comm.timing import DEATH_CHAIN_S, FORGIVEN_S, MAX_TRIAL_S, TRIAL_S
from pd_serve.frontend.tracked_request import TrackedRequest

#: Deaths that a request may have seen, the last one on trial, before its client gets an error.
MAX_DEATHS = 3

#: Deaths without regard to trials and progress.
MAX_DEATHS_IN_A_ROW = 3 * MAX_DEATHS

#: Tokens after which a recomputed request is past what its last instance died of.
PROGRESS_TOKENS = 16


class Suspects:
    """The deaths that requests have seen, and the trials.

    Args:
        requests: Requests in progress, by id.
    """

    def __init__(self, requests: Mapping[RequestId, TrackedRequest]) -> None:
        self._requests = requests
        self._loop = asyncio.get_running_loop()
        self._trials: dict[RequestId, float] = {}  # time of the start

    def forget(self, request_id: RequestId) -> None:
        """Removes a request that has ended."""
        self._trials.pop(request_id, None)

    def blame(self, requests: Collection[TrackedRequest]) -> list[TrackedRequest]:
        """An instance has died with these requests. Returns those that are given up.

        Blamed are all, but beside a request on trial none that has passed its own. Each is blamed once for
        deaths that follow each other within `DEATH_CHAIN_S`. After its first death a request is recomputed at
        once, later when no other death has followed.
        """
        now = self._loop.time()
        for request in requests:
            if now - max(request.died_at, request.recomputed_at) > FORGIVEN_S:
                request.deaths = request.deaths_in_a_row = 0
        on_trial = {request.request_id for request in requests if self._is_on_trial(request)}
        given_up = []
        for request in requests:
            is_on_trial = request.request_id in on_trial
            if on_trial and not is_on_trial and self.needs_trial(request):
                continue  # it has passed its trial
            num_tokens = len(request.ledger.token_ids)
            if now - request.died_at >= DEATH_CHAIN_S:
                request.deaths_in_a_row += 1
                request.progress = num_tokens - request.died_at_token
                request.deaths = 1 if request.progress >= PROGRESS_TOKENS else request.deaths + 1
                first = request.deaths == 1
            else:
                first = False
            request.died_at, request.died_at_token = now, num_tokens
            request.retry_at = now if first else now + DEATH_CHAIN_S
            if (is_on_trial and request.deaths > MAX_DEATHS) or request.deaths_in_a_row > MAX_DEATHS_IN_A_ROW:
                given_up.append(request)
        for request in requests:
            self._trials.pop(request.request_id, None)
        return given_up

    def needs_trial(self, request: TrackedRequest) -> bool:
        return request.deaths > 1 or request.deaths_in_a_row > MAX_DEATHS

    def begin_trial(self, request: TrackedRequest) -> None:
        self._trials[request.request_id] = self._loop.time()

    def instances_with_trials(self) -> set[str]:
        """Instances that a request is on trial on."""
        on_trial = (self._requests[request_id] for request_id in list(self._trials))
        return {
            instance_id
            for request in on_trial
            if self._is_on_trial(request)
            for instance_id in (request.ledger.owner, request.committed_to)
            if instance_id
        }

    def _is_on_trial(self, request: TrackedRequest) -> bool:
        began = self._trials.get(request.request_id)
        if began is None:
            return False
        lasted_s = self._loop.time() - began
        least = request.progress if request.deaths_in_a_row > MAX_DEATHS else 0
        goes_on = len(request.ledger.token_ids) - request.died_at_token > least
        over = lasted_s >= (TRIAL_S if goes_on else MAX_TRIAL_S)
        if over:
            del self._trials[request.request_id]
        return not over
