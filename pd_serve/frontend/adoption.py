"""A request whose client has sent it before, to an API server that is gone: it goes on from where it is.

The instances are asked first, so a request that may have been sent before waits for one round trip: one with
its client's own id.
"""

import asyncio
from typing import Any

from migration.messages import stem_of
from pd_serve.comm.requests import Adopt, FindOrphan, OrphanAnswer
from pd_serve.comm.timing import ADOPT_S, FIND_CALL_S, FIND_INTERVAL_S, FIND_ORPHAN_S, POLL_S
from pd_serve.errors import PdServeError
from pd_serve.frontend.instances import Instances
from pd_serve.frontend.request_tracker import RequestTracker
from router.request import NewRequest

#: Maximum number of instances that are asked to hand one request over. It may move from each to the next.
MAX_HOLDERS = 3


class Adoption:
    """Submits requests, and continues those that are on an instance already.

    Args:
        orphan_s: Seconds that requests go on after their API server has left; 0 for none.
    """

    def __init__(
        self, token_endpoint: str, instances: Instances, tracker: RequestTracker, orphan_s: float
    ) -> None:
        self._token_endpoint = token_endpoint
        self._instances = instances
        self._tracker = tracker
        self._orphan_s = orphan_s
        self._loop = asyncio.get_running_loop()

    async def submit(self, request_id: str, payload: list[bytes], new: NewRequest, **details: Any) -> bool:
        """Starts a request, or continues it; see `RequestTracker.submit`.

        All its tokens are delivered, from the first one on.

        Returns: whether it was begun for another API server, so that its first tokens may have been
            delivered before.
        """
        stem = stem_of(request_id)
        if not (holder := await self._find(stem)):
            self._tracker.submit(request_id, payload, new, **details)
            return False
        # Before the instance knows: the first tokens may arrive before the answer.
        request = self._tracker.submit(request_id, payload, new, holder=holder, **details)
        adopt = Adopt(request.request_id, self._token_endpoint, payload)
        for _ in range(MAX_HOLDERS):
            try:
                async with asyncio.timeout(ADOPT_S):
                    if await self._instances.call(holder, adopt):
                        return True
            except (PdServeError, TimeoutError):
                return True  # perhaps; if not, it is recomputed as after any loss of messages or instances
            if not (holder := await self._find(stem)):  # it may have moved meanwhile
                break
            self._tracker.continue_on(request, holder)
        self._tracker.continue_on(request, "")
        return False

    async def _find(self, stem: str) -> str:
        """The instance that has an orphan of this stem; "" if there is none."""
        if not stem or not self._orphan_s:
            return ""
        deadline = self._loop.time() + FIND_ORPHAN_S
        heartbeats: dict[str, int] = {}
        looks = 0
        while True:
            looks += 1
            answers = await self._ask(stem)
            if holders := [name for name, answer in answers.items() if answer.state == "orphan"]:
                return holders[0]
            doubtful = {n: a.heartbeat for n, a in answers.items() if a.state == "doubtful"}
            # Not those of the first look: a heartbeat of an API server that died then may be on its way.
            if looks > 1 and any(
                number > heartbeats.setdefault(name, number) for name, number in doubtful.items() if number
            ):
                return ""  # its API server lives
            was_here = any(answer.state == "known" for answer in answers.values())
            if not doubtful and (looks > 1 or not was_here):
                return ""  # a second look, as it may have been between two instances
            if self._loop.time() > deadline:
                return ""
            await asyncio.sleep(FIND_INTERVAL_S if doubtful else POLL_S)

    async def _ask(self, stem: str) -> dict[str, OrphanAnswer]:
        """Answers of the instances by id; those that do not answer in time are left out."""
        silent = self._instances.loads.silent()
        names = [info.instance_id for info in self._instances if info.instance_id not in silent]
        answers = await asyncio.gather(*(self._ask_one(name, stem) for name in names))
        return {name: answer for name, answer in zip(names, answers, strict=True) if answer is not None}

    async def _ask_one(self, name: str, stem: str) -> OrphanAnswer | None:
        try:
            async with asyncio.timeout(FIND_CALL_S):
                return await self._instances.call(name, FindOrphan(stem))
        except (PdServeError, TimeoutError):
            return None
