"""Finds requests by the stem of their ids."""

from migration.messages import RequestId, stem_of


class StemIndex:
    """Ids of requests by stem; see `migration.messages.stem_of`. Ids without a stem are not kept."""

    def __init__(self) -> None:
        self._ids: dict[str, dict[RequestId, None]] = {}

    def __getitem__(self, stem: str) -> list[RequestId]:
        """Ids with this stem, in the order in which they were added."""
        return list(self._ids.get(stem, ()))

    def add(self, request_id: RequestId) -> None:
        """Idempotent."""
        if stem := stem_of(request_id):
            self._ids.setdefault(stem, {})[request_id] = None

    def discard(self, request_id: RequestId) -> None:
        """Idempotent."""
        stem = stem_of(request_id)
        if (ids := self._ids.get(stem)) is not None:
            ids.pop(request_id, None)
            if not ids:
                del self._ids[stem]
