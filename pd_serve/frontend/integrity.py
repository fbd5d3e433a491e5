"""Compares the processes of the cluster with each other: the place of each request, and its reservations."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence

from migration.messages import RequestId
from pd_serve.comm.requests import Holdings
from pd_serve.comm.timing import INTEGRITY_INTERVAL_S, INTEGRITY_LOOK_S
from pd_serve.errors import PdServeError

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
