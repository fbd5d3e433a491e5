"""Requests that are not queued yet, because the prefix of their prompt is being copied here."""

from migration.messages import InstanceId, RequestId
from migration.prefix_reader import PrefixReader
from pd_serve.comm.messages import AddRequest


class PrefixWaiters:
    """Lets requests wait for their prefix, and ends those whose clients leave meanwhile."""

    def __init__(self, reader: PrefixReader) -> None:
        self._reader = reader
        self._waiting: set[tuple[RequestId, int]] = set()  # with epochs

    async def copy(self, message: AddRequest, payload: list[bytes]) -> bool:
        """Copies a request's prefix, if it was sent with an instance to copy it from.

        Returns: whether the request is still wanted.
        """
        if message.prefix_from is None:
            return True
        waiter = (message.request_id, message.epoch)
        self._waiting.add(waiter)
        try:
            await self._reader.copy(InstanceId(message.prefix_from), payload)
            return waiter in self._waiting
        finally:
            self._waiting.discard(waiter)

    def end(self, request_id: RequestId, below_epoch: int | None) -> None:
        """Ends the wait of a request, if owned under an epoch below the given one. It is not queued then."""
        self._waiting -= {
            (waiting, epoch)
            for waiting, epoch in self._waiting
            if waiting == request_id and (below_epoch is None or epoch < below_epoch)
        }
