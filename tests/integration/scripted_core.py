"""An engine core that plays a script instead of running a model, and a cluster that says what it is told."""

import asyncio
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.metrics.stats import SchedulerStats

from pd_serve.api.resumption import note_resumed
from pd_serve.errors import (
    EngineDeadError,
    InvalidRequestError,
    MigrationRefusedError,
    RefusalCode,
    UnknownTargetError,
)
from pd_serve.frontend.snapshot import ClusterSnapshot, InstanceSnapshot, WaitingRequests
from pd_serve.observe.timeline import ObservedMigration
from router.request import NewRequest
from tests.unit.pd_serve.made_migrations import migrated


class ScriptedCore(EngineCoreClient):
    """Answers with the alphabet, a letter per step, so that a lost or doubled token shows.

    The second choice of a request with n > 1 gets capitals.

    Attributes:
        refusal: Raised by the next requests instead of taking them.
        entrance: Cleared, requests wait in `add_request_async`.
        running: Cleared, requests get no further tokens.
        fails_after: Requests end with an error after that many tokens.
        resumes: Requests count as begun for another API server.
    """

    def __init__(self) -> None:
        self.resources = SimpleNamespace(engine_dead=False)
        self.engine_ranks_managed = [0, 1]
        self.added: list[EngineCoreRequest] = []
        self.aborted: list[str] = []
        self.refusal: Exception | None = None
        self.entrance, self.running = asyncio.Event(), asyncio.Event()
        self.entrance.set()
        self.running.set()
        self.fails_after: int | None = None
        self.resumes = False
        self.steps: dict[str, asyncio.Task[None]] = {}
        self._outputs: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()

    def die(self) -> None:
        """The connection to all engines is lost for good."""
        self._outputs.put_nowait(ConnectionError("no engine"))

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        await self.entrance.wait()
        if self.refusal is not None:
            raise self.refusal
        self.added.append(request)
        note_resumed(self.resumes)
        self.steps[request.request_id] = asyncio.create_task(self._decode(request))

    async def _decode(self, request: EngineCoreRequest) -> None:
        first = ord("A" if request.request_id.startswith("1_") else "a")
        length = request.sampling_params.max_tokens
        for index in range(length):
            await self.running.wait()
            await asyncio.sleep(0.001)
            reason = FinishReason.LENGTH if index + 1 == length else None
            if index == self.fails_after:
                reason = FinishReason.ERROR
            output = EngineCoreOutput(request.request_id, [first + index % 26], finish_reason=reason)
            stats = SchedulerStats(num_running_reqs=len(self.steps))
            self._outputs.put_nowait(
                EngineCoreOutputs(engine_index=1, outputs=[output], scheduler_stats=stats)
            )
            if reason is not None:
                break
        del self.steps[request.request_id]

    async def get_output_async(self) -> EngineCoreOutputs:
        output = await self._outputs.get()
        if isinstance(output, Exception):
            raise output
        return output

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        for request_id in request_ids:
            if step := self.steps.pop(request_id, None):
                step.cancel()

    async def reset_mm_cache_async(self) -> None: ...

    def shutdown(self, timeout: float | None = None) -> None:
        for step in self.steps.values():
            step.cancel()


class ScriptedCluster:
    """A `ClusterView` with the instances `p0` and `d0`, of which `p0` refuses every migration."""

    def __init__(self) -> None:
        self.num_live = 2
        self.num_waiting = 0
        self.predicted_s: float | None = None
        self.num_waiting_elsewhere = self.num_connections_elsewhere = 0
        self.violations: list[str] = []
        self.moved: list[tuple[str, str]] = []
        self.drained: list[tuple[str, bool, bool]] = []
        self.sizes: dict[str, int] = {}
        self.restarts = 0

    @property
    def takes_requests(self) -> bool:
        return self.num_live > 0

    def first_token_s(self, request: NewRequest, arriving_tokens: int) -> float | None:
        return self.predicted_s

    def snapshot(self) -> ClusterSnapshot:
        instance = InstanceSnapshot(id="d0", role="decode", state="draining", freeness=None)
        migrations = {"handoff": {"committed": 3, "aborted": 1}}
        return ClusterSnapshot(
            instances=[instance], waiting_line=WaitingRequests(0, 0), migrations=migrations
        )

    async def find_requests(self, name: str) -> list[dict[str, Any]]:
        if name == "elsewhere":
            raise EngineDeadError("owner is not there")
        return [{"id": "cmpl-mine-0", "name": "mine", "state": "decode"}] if name == "mine" else []

    async def migrate(self, request_id: str, destination: str) -> ObservedMigration:
        if destination == "p0":
            text = "p0 has 3 free blocks and the request needs 9"
            raise MigrationRefusedError(text, RefusalCode.NO_FREE_BLOCKS)
        if destination != "d0":
            raise UnknownTargetError(f"no instance {destination}")
        if request_id.startswith("gone"):
            raise UnknownTargetError(f"no running request {request_id}")
        if request_id == "elsewhere":
            raise EngineDeadError("the manager is absent")
        self.moved.append((request_id, destination))
        return ObservedMigration(migrated(stages=2, blocks=4, tokens=120), 0.0, downtime_s=0.0085)

    async def drain(self, instance_id: str, *, draining: bool = True, stop: bool = False) -> None:
        if instance_id == "p0":
            raise MigrationRefusedError("p0 is the last instance that takes new requests")
        if instance_id != "d0":
            raise UnknownTargetError(f"no instance {instance_id}")
        self.drained.append((instance_id, draining, stop))

    async def scale(self, sizes: dict[str, int]) -> None:
        if "prefill" in sizes:
            raise MigrationRefusedError("the scheduler scales prefill instances within 1:2")
        if "neutral" in sizes:
            raise EngineDeadError("owner is not there")
        if sizes.keys() - {"decode"}:
            raise InvalidRequestError("no such role")
        self.sizes = sizes

    async def restart(self, *, cancel: bool = False) -> None:
        if cancel:
            self.restarts = 0
            return
        self.restarts += 1
        if self.restarts > 1:
            raise MigrationRefusedError("a restart is under way")

    async def check_integrity(self) -> list[str]:
        return self.violations
