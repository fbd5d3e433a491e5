"""The latest loads, corrected by what has been decided since they were measured."""

from collections import deque
from collections.abc import Iterator

from router.dispatch import choose_prefill, rank_destinations
from router.load import InstanceLoad
from router.request import NewRequest


class LoadBook:
    """Decides dispatch and hand-off on reports plus what they have not seen, so that a burst that
    arrives between two reports does not herd onto one instance. Holds no request state that matters:
    a new book is right again after one round of reports.
    """

    def __init__(self) -> None:
        self._loads: dict[str, InstanceLoad] = {}
        # Dispatches not yet reported: (`requests_added` once the instance has them, prompt tokens).
        self._unseen: dict[str, deque[tuple[int, int]]] = {}
        self._expected: dict[str, dict[str, int]] = {}  # blocks by request on their way to an instance

    def __iter__(self) -> Iterator[InstanceLoad]:
        return iter(self._loads.values())

    def __getitem__(self, instance_id: str) -> InstanceLoad:
        return self._loads[instance_id]

    def get(self, instance_id: str) -> InstanceLoad | None:
        return self._loads.get(instance_id)

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self._loads

    def report(self, load: InstanceLoad) -> None:
        """Takes a report; dispatches that it has seen need no correction any more."""
        self._loads[load.instance_id] = load
        unseen = self._unseen.get(load.instance_id)
        while unseen and unseen[0][0] <= load.requests_added:
            unseen.popleft()

    def remove(self, instance_id: str) -> None:
        for table in (self._loads, self._unseen, self._expected):
            table.pop(instance_id, None)

    def dispatch(self, request: NewRequest) -> str | None:
        """Chooses where a new request starts, and counts it there. None: nowhere."""
        pending = {name: sum(tokens for _, tokens in unseen) for name, unseen in self._unseen.items()}
        chosen = choose_prefill(self._loads.values(), pending)
        if chosen is not None:
            unseen = self._unseen.setdefault(chosen, deque())
            # The instance counts what anybody sends it, so the count starts from its own report.
            before = unseen[-1][0] if unseen else self._loads[chosen].requests_added
            unseen.append((before + 1, request.prompt_tokens))
        return chosen

    def destinations(self, num_blocks: int) -> list[str]:
        """Hand-off candidates for a request of this size, best first."""
        pending = {name: sum(blocks.values()) for name, blocks in self._expected.items()}
        return rank_destinations(self._loads.values(), pending, num_blocks)

    def free_blocks(self, instance_id: str) -> int:
        """Free blocks of an instance, less what is on its way there."""
        return self._loads[instance_id].free_blocks - sum(self._expected.get(instance_id, {}).values())

    def expect(self, instance_id: str, request_id: str, num_blocks: int) -> None:
        """A request is on its way to an instance; it counts there until `settled`."""
        self._expected.setdefault(instance_id, {})[request_id] = num_blocks

    def settled(self, instance_id: str, request_id: str) -> None:
        """It has arrived (and is in the reports), or will not."""
        self._expected.get(instance_id, {}).pop(request_id, None)
