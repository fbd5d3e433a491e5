"""Interface of the HTTP layer to the cluster."""

from typing import Any, Protocol

from pd_serve.comm.requests import ManualMigration
from pd_serve.frontend.snapshot import ClusterSnapshot
from router.request import NewRequest


class ClusterView(Protocol):
    """The cluster as seen by the HTTP layer.

    The properties are read for every request, so they must be cheap.
    """

    @property
    def num_waiting(self) -> int:
        """Accepted requests without a first token."""
        ...

    @property
    def num_waiting_elsewhere(self) -> int:
        """Requests that wait, or arrive, at the other API servers, as they have last told."""
        ...

    @property
    def num_live(self) -> int:
        """Live instances that take new requests."""
        ...

    @property
    def takes_requests(self) -> bool:
        """Whether new requests are served, or wait for instances that are being started."""
        ...

    def first_token_s(self, request: NewRequest, arriving_tokens: int) -> float | None:
        """Predicts the time until a new request's first token, in seconds; None if nothing is measured yet.

        Args:
            arriving_tokens: Prompt tokens of requests that the cluster does not count yet.
        """
        ...

    def snapshot(self) -> ClusterSnapshot:
        """The body of `GET /cluster`."""
        ...

    async def find_requests(self, name: str) -> list[dict[str, Any]]:
        """Timelines of requests of any API server; see `pd_serve.observe.recorder.RequestRecorder.find`.

        Raises:
            EngineDeadError: There is none here, and other API servers could not be asked.
        """
        ...

    async def migrate(self, request_id: str, destination: str) -> ManualMigration:
        """Moves a running request to an instance.

        Args:
            request_id: The engines' id.
            destination: Instance id.

        Raises:
            UnknownTargetError: No such request or instance.
            MigrationRefusedError: The request stays where it is, or its next token comes too late.
            EngineDeadError: It is not a request of this API server, and others could not be asked.
        """
        ...

    async def drain(self, instance_id: str, *, draining: bool = True, stop: bool = False) -> None:
        """Begins to drain an instance: it takes no new requests and its requests move away.

        Args:
            draining: False uses the instance again.
            stop: Stops the instance when it is empty.

        Raises:
            UnknownTargetError: No such instance.
            MigrationRefusedError: The instance is needed, as the last one of its kind.
        """
        ...

    async def scale(self, sizes: dict[str, int]) -> None:
        """Begins to change the number of instances of pools, by role.

        Raises:
            InvalidRequestError: No such role, or no request could be served with these numbers.
            MigrationRefusedError: The scheduler scales this pool, within other bounds.
        """
        ...

    async def restart(self, *, cancel: bool = False) -> None:
        """Begins to replace every instance, one after another; with `cancel`, ends that.

        Raises:
            MigrationRefusedError: A restart is in progress, or there is none to cancel.
        """
        ...

    async def check_integrity(self) -> list[str]:
        """Descriptions of violated invariants; empty if all hold."""
        ...
