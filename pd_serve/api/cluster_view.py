"""What the HTTP layer asks of the cluster."""

from typing import Any, Protocol

from pd_serve.observe.timeline import ObservedMigration


class ClusterView(Protocol):
    """The cluster as the front end sees it.

    The properties are read once per request: they must cost no more than reading a counter.
    """

    @property
    def num_waiting(self) -> int:
        """Requests that were accepted and have no first token yet."""
        ...

    @property
    def num_live(self) -> int:
        """Live instances that can take new requests."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """Body of `GET /cluster`: `{"instances": [...], "waiting_line": {...}, "migrations": {...}, ...}`."""
        ...

    async def find_requests(self, name: str) -> list[dict[str, Any]]:
        """Timelines of the requests, running or ended not long ago, that somebody calls so; see
        `pd_serve.observe.recorder.RequestRecorder.find`. Empty: no API server has one.

        Raises:
            EngineDeadError: There is none here, and others could not be asked.
        """
        ...

    async def migrate(self, request_id: str, destination: str) -> ObservedMigration:
        """Move one running request to the instance `destination`.

        Args:
            request_id: vLLM's internal request id, the one the engines know.
            destination: Instance id.

        Raises:
            UnknownTargetError: No such request, or no such instance.
            MigrationRefusedError: It stays where it is, and why.
        """
        ...

    async def drain(self, instance_id: str, *, draining: bool = True, stop: bool = False) -> None:
        """Let an instance take nothing new, and move away what it has; or use it again.

        Args:
            stop: End it when it is empty.

        Raises:
            UnknownTargetError: No such instance.
            MigrationRefusedError: It cannot be done without, and why.
        """
        ...

    async def scale(self, sizes: dict[str, int]) -> None:
        """Begin to give pools, by role, another number of instances.

        Raises:
            InvalidRequestError: No such role, or nothing could be served with so few.
            MigrationRefusedError: The scheduler scales this pool, and within other bounds.
        """
        ...

    async def restart(self) -> None:
        """Begin to put a new instance in the place of each, one after another.

        Raises:
            MigrationRefusedError: It is under way already.
        """
        ...

    async def check_integrity(self) -> list[str]:
        """Violations of the invariants that must always hold, in words; empty when all hold."""
        ...
