"""The interface between a llumlet and an inference engine.

Implemented by `migration.vllm_engine.adapter.VllmEngine` and by
`pd_serve.simulated_engine.simulated_engine.SimulatedEngine`.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from migration.cached_keys import KeyChanges, KeyFormat
from migration.messages import FinalState, KvPart, MigrationId, RequestDescription, RequestId
from migration.prefix_store import PrefixStore
from migration.reservation import Reservation
from migration.transport.kv_transport import KvRegion
from migration.transport.worker_transport import WorkerMemory
from router.load import EngineLoad

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine is, known once it has started.

    Attributes:
        no_migration: Why it cannot migrate; None if it can.
        max_model_len: Tokens that a request may have in all.
        supported_tasks: As vLLM names them: "generate"...
        key_format: Of the keys of its prefix cache; None if it publishes none.
    """

    no_migration: str | None
    max_model_len: int
    num_blocks: int
    block_tokens: int
    supported_tasks: tuple[str, ...]
    key_format: KeyFormat | None = None


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """A request in the batch that could be moved.

    Attributes:
        priority: As in vLLM: lower is earlier, 0 is normal.
        num_tokens: Prompt and output so far.
        arrived_at: When it entered this batch, as a rank: later is greater.
    """

    request_id: RequestId
    priority: int
    num_tokens: int
    arrived_at: float


class StepProgress(NamedTuple):
    """How far an engine's steps have come.

    Attributes:
        turns: Counts up with every step and every call between two steps.
        steps: Steps that have ended.
        is_busy: A step or a call is in progress. An idle engine makes no turns.
    """

    turns: int
    steps: int
    is_busy: bool


class HeldBlocks(NamedTuple):
    """KV blocks of one request in one engine; those that requests share count for each of them.

    Attributes:
        arriving: They are reserved for a request that is on its way here.
    """

    request_id: RequestId
    blocks: int
    arriving: bool


class HeldRequest(NamedTuple):
    """A request of one engine as it reports it to the request's API server.

    Attributes:
        epoch: Ownership epoch here.
        emitted: Output tokens that the API server has been sent, by any instance.
        finished: It has ended here a short while ago, and can still be sent again.
    """

    request_id: RequestId
    epoch: int
    emitted: int
    finished: bool = False


#: The requests of an engine by client: the endpoint that takes their tokens. Arriving ones are left out.
HeldByClient = dict[str, list[HeldRequest]]


@dataclass
class EngineEvents:
    """Callbacks of an engine, all on the llumlet's event loop.

    Attributes:
        on_prefill_started: The first step of these requests has begun, which ask for a hand-off and can move.
            They can be offered while it computes.
    """

    on_prefill_started: Callable[[list[RequestDescription]], None]
    on_requests_ended: Callable[[list[RequestId]], None]  # finished or aborted, wherever they were
    on_load: Callable[[EngineLoad], None]  # after a step
    on_death: Callable[[BaseException], None]  # the step loop has failed; nothing more will come
    on_unmovable: Callable[[dict[str, int]], None] = lambda numbers: None  # requests that stay, by reason


class CachedKeySource(Protocol):
    """The keys of the blocks in an engine's prefix cache, as they change."""

    async def take(self, most: int) -> KeyChanges | None:
        """Takes up to `most` changes since the last call; first, and after the cache was emptied, all of it.

        Returns: None if nothing has changed. Does not wait for a step then.
        """


class Engine(Protocol):
    """An inference engine that can move running requests to another engine.

    All calls come from one event loop. They are carried out in order, each between two engine steps. A
    request is here once at most, copies that arrive excepted: the copy of the highest epoch. The engine
    reports its load, finished requests and its own failure by the `EngineEvents` that it is made with.
    """

    @property
    def facts(self) -> EngineFacts:
        """Known once `start` has returned."""
        ...

    @property
    def regions(self) -> Sequence[KvRegion]:
        """The KV cache's memory in this process, for the transport; known once `start` has returned."""
        ...

    @property
    def workers(self) -> Sequence[WorkerMemory]:
        """The KV cache's memory, in the place of `regions`, if the engine's workers have processes."""
        ...

    @property
    def cached_keys(self) -> CachedKeySource:
        """The prefix cache; known once `start` has returned."""
        ...

    @property
    def progress(self) -> StepProgress:
        """For a watch that notices a step which hangs. Does not wait for the step."""
        ...

    @property
    def prefixes(self) -> PrefixStore:
        """The prefix cache, for copies of prefixes; known once `start` has returned."""
        ...

    async def start(self) -> None:
        """Loads the model. Raises: whatever the engine raises."""

    async def stop(self) -> None:
        """Ends the engine after the step in progress. Pending calls are never answered."""

    # requests
    async def add(
        self,
        payload: list[bytes],
        client: str,
        *,
        epoch: int = 0,
        output_token_ids: list[int] | None = None,
        handoff: bool = False,
    ) -> bool:
        """Queues a request. With output tokens, continues it by recomputing (its former owner died).

        An older copy of the request, of a lower epoch, ends.

        Returns: whether it was queued. If not, a copy of this or a higher epoch is here, which stays.
        """

    async def abort(self, request_ids: list[RequestId], below_epoch: int | None = None) -> list[RequestId]:
        """Ends requests without output, if owned under an epoch below the given one.

        Their ends are reported before it returns.

        Returns: those that are not here, or only on their way.
        """

    # as a source
    async def running_requests(self) -> list[RunningRequest]:
        """The requests that a migration could take away now: decoding, and of a kind that can move."""

    async def describe(self, request_id: RequestId) -> RequestDescription:
        """Describes a running request for its destination.

        Raises:
            SourceGoneError: not here (NOT_HERE), or not in the batch at present (NOT_RUNNING).
            DestinationRefusedError: of a kind that cannot move.
        """

    async def next_stage(
        self,
        request_id: RequestId,
        incarnation: int,
        tokens_done: int,
        *,
        suspend: bool,
        reader: MigrationId,
    ) -> KvPart | FinalState:
        """Waits until there is something to copy beyond `tokens_done`, deciding at step boundaries.

        Returns the full blocks that are safe to read; or, once the prompt is prefilled and no full block is
        left (or `suspend` is set), suspends the request, waits until steps in flight have drained, and
        returns its final state. Only one call per request at a time.

        The blocks that it returns are pinned for the migration `reader`: they keep their contents, whatever
        becomes of the request, until the next call for this reader or `unpin`.

        Raises:
            SourceGoneError: finished, aborted or preempted (`incarnation` differs).
        """

    async def resume(self, request_id: RequestId, epoch: int) -> None:
        """Ends a pending `next_stage` and puts a suspended request back, owned under `epoch`. Idempotent."""

    async def release(self, request_id: RequestId) -> None:
        """Frees a suspended request without output: it lives elsewhere now. Idempotent."""

    async def unpin(self, reader: MigrationId) -> None:
        """Gives back the blocks that this migration was offered: nothing reads them any more. Idempotent."""

    # as a destination
    async def reserve(self, migration_id: MigrationId, request: RequestDescription) -> Reservation:
        """Raises: DestinationRefusedError: with the reason; nothing is held."""

    async def grow(self, migration_id: MigrationId, num_tokens: int) -> list[list[int]]:
        """Makes the reservation long enough for `num_tokens` tokens; returns its tables.

        Raises: DestinationRefusedError: no free blocks; what was held stays held.
        """

    async def commit(self, migration_id: MigrationId, state: FinalState) -> None:
        """The request enters the batch at the next step, and ends an older copy of it.

        Its blocks stay out of the prefix cache until `publish`.

        Raises: DestinationRefusedError: among others SUPERSEDED, a copy of this or a higher epoch is here.
        """

    async def publish(self, migration_id: MigrationId) -> None:
        """The source has confirmed what was read: the blocks may enter the prefix cache. Idempotent."""

    async def drop(self, migration_id: MigrationId) -> None:
        """Undoes what this migration brought: frees a reservation, ends a committed request silently."""

    # the rest
    async def abort_client(self, client: str) -> None:
        """Ends all requests whose tokens go to an API server that is gone."""

    async def clients_of(self, stem: str) -> set[str]:
        """The clients of the requests here, and of those that ended here lately, whose ids have this stem."""

    async def adopt(
        self, request_id: RequestId, payload: list[bytes], client: str, living: Collection[str]
    ) -> bool:
        """Continues a request of the same stem, whose client is not a living one, as this request.

        The request gets this id, payload and client, and epoch 0, and stays where it is; a migration of it
        ends. All its output is sent from the first token on, and its end if it has ended.

        Returns: whether there was such a request. A second call finds none.
        """

    async def visit_requests(self, visit: Callable[[HeldByClient], T]) -> T:
        """Calls `visit` with the requests here, and returns its result.

        The call happens between two steps, on the thread that sends the outputs: after all outputs of which
        `emitted` tells, and before all others.
        """

    async def resend(self, asked: list[tuple[RequestId, int]]) -> None:
        """Sends output tokens again, from an index on, and the end of a request that has finished.

        Unknown requests are ignored, and those whose outputs have more than tokens (logprobs): what was lost
        of them can only be recomputed.
        """

    async def live_requests(self, client: str | None = None) -> list[RequestId]:
        """Every request that holds something here, arriving ones included; of one client, or of all."""

    async def held_blocks(self) -> list[HeldBlocks]:
        """The KV blocks of each request here. For the live page; no decision needs them."""

    async def utility(self, method: str, *arguments: object) -> object:
        """Calls one of the engine's own control methods, by the name that vLLM's front end uses.

        Raises: InvalidRequestError: the engine has no such method.
        """

    async def check_integrity(self, under_way: Collection[MigrationId] = ()) -> list[str]:
        """The violated invariants of the engine, in words; empty if all hold.

        Args:
            under_way: Migrations from here and copies of prefixes: what is held for them is no violation.
        """
