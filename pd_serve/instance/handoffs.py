"""Hand-offs: a prefill instance gives each of its requests to a decode instance after the first step."""

import asyncio
import logging

from migration.coordinator import MigrationCoordinator
from migration.engine_interface import Engine
from migration.errors import MigrationError
from migration.messages import InstanceId, RequestDescription, RequestId
from migration.tasks import BackgroundTasks
from pd_serve.comm.membership import MembershipView
from pd_serve.comm.timing import STRANDED_CHECK_S
from pd_serve.instance.load_reporter import LoadReporter
from router.load import EngineLoad

logger = logging.getLogger(__name__)


class Handoffs:
    """Hand-offs of a prefill instance: starts one at a request's first step, and lists stranded requests.

    A request is offered while its first step computes, so that the destination has room for it by the end of
    the step.

    Every request is stranded that decodes on a prefill instance, can move and is not leaving, however it came
    there: its hand-off failed, it was preempted during it, it has moved there, or the instance has changed
    its role. It decodes there until an API server, which has all loads, chooses a destination.

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
        self._in_progress: set[RequestId] = set()
        self._stranded: set[RequestId] = set()
        self._gone: set[RequestId] | None = None  # during a look for stranded requests
        self._stepped = asyncio.Event()
        self._engine: Engine
        self._coordinator: MigrationCoordinator

    def start(self, engine: Engine, coordinator: MigrationCoordinator) -> None:
        self._engine, self._coordinator = engine, coordinator
        self._tasks.start(self._find_stranded())

    def expect(self, request_id: RequestId, candidates: list[str]) -> None:
        """Hands the request off to one of these instances, best first, when its prefill starts."""
        self._candidates[request_id] = candidates

    def forget(self, request_id: RequestId) -> None:
        """Removes a request that has ended, has moved, or that the engine refused."""
        self._candidates.pop(request_id, None)
        self._stranded.discard(request_id)
        if self._gone is not None:
            self._gone.add(request_id)

    @property
    def stranded(self) -> list[RequestId]:
        return sorted(self._stranded)

    @property
    def unfinished(self) -> list[RequestId]:
        """Requests that wait for a hand-off, including stranded ones; none when the instance is at rest."""
        return sorted(self._stranded | set(self._candidates))

    def on_engine_load(self, load: EngineLoad) -> None:
        """The engine has made a step."""
        if load.running and (self._reporter.role == "prefill" or self._stranded):
            self._stepped.set()

    def on_prefill_started(self, started: list[RequestDescription]) -> None:
        """See `EngineEvents`."""
        for request in started:
            if (candidates := self._candidates.pop(request.request_id, None)) is not None:
                self.hand_off(request.request_id, candidates, request)

    def hand_off(
        self, request_id: RequestId, candidates: list[str], description: RequestDescription | None = None
    ) -> None:
        """Hands off a request to one of these instances, best first.

        Args:
            description: The request as it is, if that is known.
        """
        if request_id not in self._in_progress:
            self._in_progress.add(request_id)
            self._tasks.start(self._hand_off(request_id, candidates, description))

    async def _hand_off(
        self, request_id: RequestId, candidates: list[str], description: RequestDescription | None
    ) -> None:
        migrate = self._coordinator.migrate
        try:
            for candidate in candidates:
                if not self._members.has_peer(candidate):
                    continue  # stopped or dead, so that it would not answer
                destination = InstanceId(candidate)
                record = await migrate(request_id, destination, "handoff", description=description)
                if record.committed:
                    break
                description = None  # it has gone on meanwhile
        except MigrationError as error:
            code = error.refusal.code
            logger.info("request %s: stays on %s (%s): %s", request_id, self._name, code, error)
        finally:
            self._in_progress.discard(request_id)
            self._stepped.set()

    async def _find_stranded(self) -> None:
        """Looks for stranded requests after steps and after each failed hand-off."""
        while True:
            await self._stepped.wait()
            self._stepped.clear()
            found = await self._decoding_here() if self._reporter.role == "prefill" else set()
            for request_id in sorted(found - self._stranded):
                logger.info("request %s: no decode instance takes it, %s decodes it", request_id, self._name)
            if found != self._stranded:
                self._stranded = found
                self._reporter.report_soon()
            await asyncio.sleep(STRANDED_CHECK_S)

    async def _decoding_here(self) -> set[RequestId]:
        """Requests that decode here, could move and are not leaving."""
        self._gone = gone = set[RequestId]()
        running = {request.request_id for request in await self._engine.running_requests()}
        self._gone = None
        return {request_id for request_id in running - gone if not self._is_leaving(request_id)}

    def _is_leaving(self, request_id: RequestId) -> bool:
        return request_id in self._in_progress or self._coordinator.is_leaving(request_id)
