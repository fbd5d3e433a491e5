"""Requests that outlive their API server: they go on without a reader until another API server adopts them.

Every request of an API server that has left the membership goes on for `orphan_s` seconds and ends then. A
client that sends its request again to another API server gets it from there: the request keeps its place, KV
blocks and tokens, and continues under the id of the request that was sent again. So nothing that the former
API server, or a migration in progress, still sends under the former id concerns it. The ids of both have the
same stem only if id, prompt, parameters and credentials of the client are the same.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterable

from migration.engine_interface import Engine
from migration.messages import stem_of
from pd_serve.comm.leases import LeaseClock, Leases
from pd_serve.comm.membership import MembershipView
from pd_serve.comm.requests import Adopt, FindOrphan, OrphanAnswer
from pd_serve.comm.timing import FIND_CALL_S, READER_SILENCE_S

logger = logging.getLogger(__name__)

#: Maximum number of stems of requests that have been here. The others take no part in a search.
MAX_STEMS = 20_000


class Orphans:
    """Answers API servers that look for orphans on one instance, and hands orphans over.

    Attributes:
        num_adopted: Requests handed over since the start.
    """

    def __init__(self, members: MembershipView) -> None:
        self.num_adopted = 0
        self._members = members
        self._stems: OrderedDict[str, None] = OrderedDict()
        self._heartbeats: dict[str, int] = {}
        self._clock = LeaseClock()
        self._leases = Leases(READER_SILENCE_S, self._clock)
        self._engine: Engine

    def start(self, engine: Engine) -> None:
        self._engine = engine

    # ---- what the instance receives

    def on_message(self) -> None:
        """Any message has arrived."""
        self._clock.on_message()

    def on_heartbeat(self, api_server: str, number: int) -> None:
        if api_server in self._members.api_servers:
            self._heartbeats[api_server] = number
            self._leases.renew(api_server)

    def on_membership(self, left: Iterable[str]) -> None:
        """The membership has come; these API servers have left it."""
        for api_server in left:
            self._heartbeats.pop(api_server, None)
            self._leases.drop(api_server)
        for api_server in self._members.api_servers:
            self._leases.begin(api_server)

    def note(self, request_id: str) -> None:
        """A request is here, or on its way here. Most searches need no visit of the engine by this."""
        if not (stem := stem_of(request_id)):
            return
        self._stems[stem] = None
        self._stems.move_to_end(stem)
        if len(self._stems) > MAX_STEMS:
            self._stems.popitem(last=False)

    # ---- calls

    async def find(self, sender: str, request: FindOrphan) -> OrphanAnswer:
        if request.stem not in self._stems:
            return OrphanAnswer("unknown")
        try:
            async with asyncio.timeout(FIND_CALL_S / 2):  # a long step: the sender asks again
                clients = await self._engine.clients_of(request.stem)
        except TimeoutError:
            return OrphanAnswer("doubtful")
        living = self._living()
        if clients - living.keys():
            return OrphanAnswer("orphan")
        others = [living[client] for client in clients if living[client] != sender]
        if not others:
            return OrphanAnswer("known")
        return OrphanAnswer("doubtful", max(self._heartbeats.get(name, 0) for name in others))

    async def adopt(self, sender: str, request: Adopt) -> bool:
        request_id = request.request_id
        self.note(request_id)
        is_adopted = await self._engine.adopt(
            request_id, [bytes(frame) for frame in request.payload], request.client, self._living().keys()
        )
        if is_adopted:
            self.num_adopted += 1
            logger.info("request %s: goes on for %s, its former API server is gone", request_id, sender)
        return is_adopted

    def _living(self) -> dict[str, str]:
        """Names of the API servers that read their requests, by token endpoint."""
        silent = self._leases.expired()
        servers = self._members.api_servers.items()
        return {info.token_endpoint: name for name, info in servers if name not in silent}
