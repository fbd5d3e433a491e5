"""Compares the processes of the cluster with each other: the place of each request, and its reservations."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence

from migration.messages import RequestId
from pd_serve.comm.cluster_state import ClusterState
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.requests import CheckIntegrity, Holdings, ListHoldings, ListRequests
from pd_serve.comm.timing import INTEGRITY_INTERVAL_S, INTEGRITY_LOOK_S, INTEGRITY_SETTLE_S
from pd_serve.errors import PdServeError
from pd_serve.frontend.instances import Instances
from pd_serve.frontend.request_tracker import RequestTracker

logger = logging.getLogger(__name__)

#: Looks of one check; a violation is in all of them.
NUM_LOOKS = 3


def without_client(
    live: Mapping[str, Sequence[RequestId]], owners: Mapping[RequestId, str]
) -> dict[str, list[RequestId]]:
    """Requests that an instance holds for an API server that does not know them, by instance.

    Args:
        live: The API server's requests as each instance has them.
        owners: Those that the API server knows, with the instance that each of them is on; "" for none.
    """
    found = {name: sorted(set(request_ids) - owners.keys()) for name, request_ids in live.items()}
    return {name: request_ids for name, request_ids in found.items() if request_ids}


def lost(live: Mapping[str, Sequence[RequestId]], owners: Mapping[RequestId, str]) -> list[RequestId]:
    """Requests that an API server takes to be on an instance, and that no instance has."""
    held = {request_id for request_ids in live.values() for request_id in request_ids}
    return sorted(request_id for request_id, owner in owners.items() if owner and request_id not in held)


def compare_holdings(holdings: Mapping[str, Holdings]) -> list[str]:
    """Violations among the requests that instances hold and exchange, one line for each."""
    sent = {(request, to) for h in holdings.values() for request, to, _ in h.leaving}
    leaving = {request for request, _ in sent}
    problems, holders = [], defaultdict(list)
    for name, here in holdings.items():
        for request_id, blocks, arriving in here.held:
            if not arriving:
                holders[request_id].append(name)
            elif (request_id, name) not in sent:
                problems.append(f"{name}: {blocks} blocks are held for {request_id}, which no instance sends")
    for request_id, names in holders.items():
        if len(names) > 1 and request_id not in leaving:
            problems.append(f"{' and '.join(sorted(names))} hold {request_id}, which is not being moved")
    return sorted(problems)


class IntegrityChecks:
    """Checks of all processes by one API server.

    Args:
        token_endpoint: Of this API server, by which instances know its requests.
        state: Returns what the manager has last told; None before it has.
    """

    def __init__(
        self,
        wire: MessageWire,
        instances: Instances,
        tracker: RequestTracker,
        token_endpoint: str,
        state: Callable[[], ClusterState | None],
    ) -> None:
        self._wire = wire
        self._instances = instances
        self._tracker = tracker
        self._token_endpoint = token_endpoint
        self._state = state

    async def check(self) -> list[str]:
        """Checks all processes until there is no problem, or a problem persists for `INTEGRITY_SETTLE_S`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + INTEGRITY_SETTLE_S
        while True:
            problems = await self.problems()
            problems = problems or compare_holdings(await self._instances.call_all(ListHoldings()))
            if not problems or loop.time() > deadline:
                return problems
            await asyncio.sleep(0.1)

    async def problems(self) -> list[str]:
        """What is violated now, if no request is on its way."""
        problems = self._wire.failures.problems()
        if (state := self._state()) is not None:
            problems += state.problems
            problems += state.scheduler_stats.problems if state.scheduler_stats is not None else []
        for found in (await self._instances.call_all(CheckIntegrity())).values():
            problems += found
        unread, missing = await self._compare_requests()
        for instance_id, requests in unread.items():
            problems.append(f"{instance_id}: holds requests that no client waits for: {requests}")
        problems += [f"no instance has the request {request_id}" for request_id in missing]
        waiting = sum(not request.ledger.token_ids for request in self._tracker.requests.values())
        if self._tracker.num_waiting != waiting:
            problems.append(
                f"{self._tracker.num_waiting} requests are counted as waiting, and {waiting} wait"
            )
        return problems

    async def suspicions(self) -> list[str]:
        """What seems to be violated now, although requests are on their way; one line each."""
        found: list[str] = []
        for problems in (await self._instances.call_all(CheckIntegrity(at_rest=False))).values():
            found += problems
        unread, missing = await self._compare_requests()
        for instance_id, requests in unread.items():
            found += [f"{instance_id}: no client waits for the request {request}" for request in requests]
        found += [f"no instance has the request {request_id}" for request_id in missing]
        return found + compare_holdings(await self._instances.call_all(ListHoldings()))

    async def _compare_requests(self) -> tuple[dict[str, list[RequestId]], list[RequestId]]:
        """This API server's requests that it does not know, by instance; and those that no instance has."""
        live = await self._instances.call_all(ListRequests(self._token_endpoint))
        requests = self._tracker.requests
        owners = {request_id: request.ledger.owner for request_id, request in requests.items()}
        return without_client(live, owners), lost(live, owners)


class IntegrityWatch:
    """Checks every `INTEGRITY_INTERVAL_S`, also under load: a violation is what several looks find alike.

    Args:
        look: Returns what seems to be violated now, one line each.
        on_result: Called with the violations after each check.
    """

    def __init__(
        self, look: Callable[[], Awaitable[Sequence[str]]], on_result: Callable[[list[str]], None]
    ) -> None:
        self._look = look
        self._on_result = on_result
        self._last: list[str] = []

    async def run(self) -> None:
        while True:
            await asyncio.sleep(INTEGRITY_INTERVAL_S)
            try:
                found = await self.check()
            except (PdServeError, TimeoutError) as error:
                logger.info("the integrity of the cluster was not checked: %s", error)  # an instance has died
                continue
            for violation in sorted(set(found) - set(self._last)):
                logger.error("integrity: %s", violation)
            self._last = found
            self._on_result(found)

    async def check(self) -> list[str]:
        """The violations that all looks of one check have found."""
        found = set(await self._look())
        for _ in range(NUM_LOOKS - 1):
            if not found:
                break
            await asyncio.sleep(INTEGRITY_LOOK_S)
            found &= set(await self._look())
        return sorted(found)
