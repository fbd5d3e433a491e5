"""Hand-offs: a prefill instance gives each of its requests to a decode instance after the first step."""

import logging

from migration.coordinator import MigrationCoordinator
from migration.engine_interface import Engine
from migration.errors import MigrationError, RefusalCode
from migration.messages import InstanceId, RequestId
from migration.tasks import BackgroundTasks
from pd_serve.comm.membership import MembershipView
from pd_serve.instance.load_reporter import LoadReporter

logger = logging.getLogger(__name__)

#: Refusals after which no other hand-off of the request can succeed.
_FOR_GOOD = (RefusalCode.NOT_HERE, RefusalCode.UNSUPPORTED_ENGINE, RefusalCode.UNSUPPORTED_REQUEST)


class Handoffs:
    """Hand-offs of a prefill instance: starts one at a request's first step, and lists stranded requests.

    A stranded request stays on its prefill instance, perhaps preempted, until an API server, which has all
    loads, chooses another destination.

    Args:
        tasks: Tasks of the hand-offs.
    """

    def __init__(
        self, name: str, members: MembershipView, reporter: LoadReporter, tasks: BackgroundTasks
    ) -> None:
        self._name = name
        self._members = members
        self._reporter = reporter
        self._tasks = tasks
        self._candidates: dict[RequestId, list[str]] = {}
        self._stranded: set[RequestId] = set()
        self._engine: Engine
        self._coordinator: MigrationCoordinator

    def start(self, engine: Engine, coordinator: MigrationCoordinator) -> None:
        self._engine, self._coordinator = engine, coordinator

    def expect(self, request_id: RequestId, candidates: list[str]) -> None:
        """Hands the request off to one of these instances, best first, when its prefill starts."""
        self._candidates[request_id] = candidates

    def forget(self, request_id: RequestId) -> None:
        """Removes a request that has ended, has moved, or that the engine refused."""
        self._candidates.pop(request_id, None)
        self._stranded.discard(request_id)

    @property
    def stranded(self) -> list[RequestId]:
        return sorted(self._stranded)

    @property
    def unfinished(self) -> list[RequestId]:
        """Requests that wait for a hand-off, including stranded ones; none when the instance is at rest."""
        return sorted(self._stranded | set(self._candidates))

    def on_prefill_started(self, request_ids: list[RequestId]) -> None:
        for request_id in request_ids:
            if (candidates := self._candidates.pop(request_id, None)) is not None:
                self._tasks.start(self._hand_off(request_id, candidates))

    def retry(self, request_id: RequestId, destination: str) -> None:
        """Hands off a stranded request to the destination that an API server has chosen."""
        self._tasks.start(self._retry(request_id, destination))

    async def _retry(self, request_id: RequestId, destination: str) -> None:
        try:
            await self._coordinator.migrate(request_id, InstanceId(destination), "handoff")
        except MigrationError as error:
            self._stays(request_id, error)

    async def _hand_off(self, request_id: RequestId, candidates: list[str]) -> None:
        for candidate in candidates:
            if not self._members.has_peer(candidate):
                continue  # stopped or dead, so that it would not answer
            try:
                record = await self._coordinator.migrate(request_id, InstanceId(candidate), "handoff")
            except MigrationError as error:
                self._stays(request_id, error)
                break
            if record.committed:
                return
        await self._strand(request_id)

    async def _strand(self, request_id: RequestId) -> None:
        self._stranded.add(request_id)  # before the engine's answer: the request may end meanwhile
        try:
            await self._engine.describe(request_id)
        except MigrationError as error:
            self._stays(request_id, error)
        if request_id in self._stranded:
            logger.info("request %s: no decode instance takes it, it stays on %s", request_id, self._name)
            self._reporter.report_soon()

    def _stays(self, request_id: RequestId, error: MigrationError) -> None:
        code = error.refusal.code
        logger.info("request %s: stays on %s (%s): %s", request_id, self._name, code, error)
        if code in _FOR_GOOD:
            self._stranded.discard(request_id)
