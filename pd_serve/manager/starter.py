"""Starts instances: at the start of the service, for the scheduler, and to reach the wanted sizes."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from migration.tasks import BackgroundTasks
from pd_serve.comm.cluster_state import StartingInstance
from pd_serve.comm.membership import InstanceInfo
from pd_serve.comm.timing import EARLY_DEATH_S, POLL_S, START_TIMEOUT_S
from pd_serve.errors import EngineDeadError, PdServeError
from pd_serve.manager.backoff import Backoff
from pd_serve.manager.decision_log import DecisionLog
from pd_serve.manager.register import InstanceRegister

logger = logging.getLogger(__name__)


class Starter:
    """Starts instances, with a backoff after failed starts.

    Args:
        start: Starts an instance by id and role, and returns when it is ready. Raises: PdServeError.
        waits_for: Returns the resources that a starting instance waits for, as a text; "" if it has them.
        on_change: Called when the starting instances or the register have changed.

    Attributes:
        next_numbers: Number of the next instance id, by role. Ids are not used again, because messages about
            an earlier instance with that id may still arrive.
    """

    def __init__(
        self,
        register: InstanceRegister,
        log: DecisionLog,
        start: Callable[[str, str], Awaitable[InstanceInfo]],
        waits_for: Callable[[str], str],
        on_change: Callable[[], None],
        next_numbers: Mapping[str, int],
    ) -> None:
        self._register = register
        self._log = log
        self._start = start
        self._waits_for = waits_for
        self._on_change = on_change
        self.next_numbers = dict(next_numbers)
        self._loop = asyncio.get_running_loop()
        self._tasks = BackgroundTasks()
        self._starting: dict[str, str] = {}  # role by id, until the first load report
        self._queued: list[tuple[str, str, str]] = []  # id, role and reason of starts that have to succeed
        self._retries: dict[str, asyncio.TimerHandle] = {}  # by role
        self._backoffs: dict[str, Backoff] = {role: Backoff() for role in next_numbers}
        self._repeating: dict[str, asyncio.Task[None]] = {}  # starts that repeat and are under way, by id

    async def close(self) -> None:
        for timer in self._retries.values():
            timer.cancel()
        await self._tasks.cancel()

    # ---- starting instances

    @property
    def not_ready(self) -> dict[str, str]:
        """Roles of the starting instances that are not registered yet, by id."""
        return {name: role for name, role in self._starting.items() if name not in self._register}

    @property
    def num_starting(self) -> Counter[str]:
        """By role. An instance counts until it reports, so that the scheduler requests no other one."""
        return Counter(self._starting.values())

    def num_coming(self, role: str, *, besides: str = "") -> int:
        """Number of starting instances of a role that are not registered yet, including queued ones."""
        starting = [name for name, r in self.not_ready.items() if r == role and name != besides]
        return len(starting) + [r for _, r, _ in self._queued].count(role)

    def rows(self) -> list[StartingInstance]:
        """For `GET /cluster`."""
        rows = [StartingInstance(n, r, self._waits_for(n) or "starting") for n, r in self.not_ready.items()]
        return rows + [StartingInstance(n, role, f"to be started: {why}") for n, role, why in self._queued]

    def is_backing_off(self, role: str) -> bool:
        """Whether the backoff of this role has not ended."""
        return self._loop.time() < self._backoffs[role].retry_at

    # ---- starting

    async def start_first(self, names: list[tuple[str, str]]) -> None:
        """Starts the first instances, by id and role.

        Returns when every instance is ready or waits for resources, and the ready ones suffice to serve.

        Raises:
            PdServeError: An instance does not start.
        """
        starts: dict[asyncio.Future[None], str] = {}
        for name, role in names:
            self._starting[name] = role
            starts[asyncio.ensure_future(self._start_or_fail(name))] = name
        try:
            while starts and not (all(map(self._waits_for, self.not_ready)) and self._register.can_serve()):
                done, _ = await asyncio.wait(starts, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                for start in done:
                    start.result()
                    del starts[start]
        except (Exception, asyncio.CancelledError):
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            raise
        for start, name in starts.items():
            self._tasks.start(self._finish_late(start, name))

    async def _start_or_fail(self, name: str) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                info = await self._start(name, self._starting[name])
        except TimeoutError as error:
            raise EngineDeadError(f"{name} has not started: {self._why_late(name)}") from error
        del self._starting[name]
        self._ready(info)

    async def _finish_late(self, start: "asyncio.Future[None]", name: str) -> None:
        try:
            await start
        except Exception as error:  # whatever it is, there has to be another try
            if not isinstance(error, PdServeError):
                logger.error("a start has failed", exc_info=error)
            role = self._starting.pop(name)
            self._log.add(str(error))
            self._failed(role)
            self.start_until_ready(role, "there were no resources for it at the start")
        finally:
            start.cancel()

    def start_once(self, role: str, reason: str) -> None:
        """Starts an instance of a role. A failed start is not repeated."""
        self._tasks.start(self.bring_up(self.new_id(role, reason), role))

    def start_until_ready(self, role: str, reason: str) -> None:
        """Starts an instance of a role, again and again until it succeeds."""
        self._queued.append((self._next_id(role), role, reason))
        self._start_queued(role)
        self._on_change()

    def unqueue(self, role: str) -> bool:
        """Cancels one start that has not begun. Returns False if there is none."""
        for queued in self._queued:
            if queued[1] == role:
                self._queued.remove(queued)
                self._on_change()
                return True
        return self._give_up_newest(role)

    def _give_up_newest(self, role: str) -> bool:
        for name in reversed(self._repeating):
            if self.not_ready.get(name) == role:
                del self._starting[name]  # at once, so that its pool counts it no more
                self._repeating.pop(name).cancel()
                self._log.add(f"{name} is not started any more: its pool is made smaller")
                return True
        return False

    def _start_queued(self, role: str) -> None:
        """Starts the queued instances of a role as soon as its backoff ends."""
        if role not in self._retries:
            at = max(self._backoffs[role].retry_at, self._loop.time())
            self._retries[role] = self._loop.call_at(at, self._backoff_ended, role)

    def _backoff_ended(self, role: str) -> None:
        del self._retries[role]
        if self.is_backing_off(role):
            return self._start_queued(role)  # another start has failed meanwhile
        begun = [queued for queued in self._queued if queued[1] == role]
        self._queued = [queued for queued in self._queued if queued[1] != role]
        for name, _, reason in begun:
            self._begin(name, role, reason)
            self._repeating[name] = self._tasks.start(self._repeat(name, role, reason))

    async def _repeat(self, name: str, role: str, reason: str) -> None:
        ready = await self.bring_up(name, role)
        del self._repeating[name]
        if not ready:
            self.start_until_ready(role, reason)

    def exclude(self, instance_id: str) -> None:
        """An instance of an earlier manager has this id, which its notes may lack."""
        role, _, number = instance_id.rpartition("-")
        self.next_numbers[role] = max(self.next_numbers.get(role, 0), int(number) + 1)

    def new_id(self, role: str, reason: str) -> str:
        """Id of the next instance of a role, which counts as starting from now on."""
        name = self._next_id(role)
        self._begin(name, role, reason)
        return name

    def _next_id(self, role: str) -> str:
        number = self.next_numbers.get(role, 0)
        self.next_numbers[role] = number + 1
        return f"{role}-{number}"

    def _begin(self, name: str, role: str, reason: str) -> None:
        self._starting[name] = role
        self._log.add(f"{name} is started: {reason}")

    async def bring_up(self, name: str, role: str) -> bool:
        """Starts an instance with an id of `new_id`. Returns whether it is ready and has reported."""
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                info = await self._start(name, role)
            self._ready(info)
            while name in self._register and self._register.load_of(name) is None:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
        except Exception as error:
            if not isinstance(error, PdServeError | TimeoutError):
                logger.exception("%s: starting it failed", name)
            self._log.add(f"{name} has not started: {str(error) or self._why_late(name)}")
            self._failed(role)
            return False
        else:
            self._log.count("start", role)
            return True
        finally:
            self._starting.pop(name, None)
            self._on_change()

    def _ready(self, info: InstanceInfo) -> None:
        self._register.add(info)
        self._on_change()

    def _why_late(self, name: str) -> str:
        return self._waits_for(name) or f"not ready after {START_TIMEOUT_S:.0f} s"

    # ---- failures

    def died(self, role: str, age_s: float) -> None:
        """Counts the death of an instance soon after its start."""
        if age_s < EARLY_DEATH_S:
            self._backoff(role).died_early(self._loop.time())

    def _failed(self, role: str) -> None:
        self._backoff(role).failed(self._loop.time())

    def _backoff(self, role: str) -> Backoff:
        """The backoff of a role, reset if one of its instances has lived since the last failure."""
        backoff = self._backoffs.setdefault(role, Backoff())
        now, failed_at = self._loop.time(), backoff.failed_at
        ages = [self._register.age_s(n) for n, r in self._register.roles().items() if r == role]
        if failed_at is not None and any(EARLY_DEATH_S <= age < now - failed_at for age in ages):
            backoff.reset()  # since the last failure an instance has started and has not died early
        return backoff
