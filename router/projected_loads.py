"""The latest loads, corrected by what has been decided since they were measured."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from msgspec.structs import replace

from router import handoff
from router.dispatch import DISPATCH_POLICIES, can_start, candidates
from router.headroom import limit_headroom
from router.load import InstanceLoad
from router.policies import PolicySet, policy_set
from router.request import NewRequest


class Unseen(NamedTuple):
    """A dispatch that no report has seen yet: the instance's count once it has it, and its size."""

    requests_added: int
    tokens: int
    blocks: int


class ProjectedLoads:
    """Decides dispatch and hand-off on reports plus what they have not seen, so that a burst that
    arrives between two reports does not herd onto one instance. Holds no request state that matters:
    a new book is right again after one round of reports.

    Args:
        policies: Decides by these; by default `llumnix`.
        clock: Seconds, to tell how old a report is. None: reports do not age.
    """

    def __init__(
        self,
        policies: PolicySet | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.policies = policies or policy_set("llumnix")
        self._rng = rng or random.Random(0)
        self._clock = clock or (lambda: 0.0)
        self._dispatch = DISPATCH_POLICIES[self.policies.dispatch]()
        self._prefill_dispatch = DISPATCH_POLICIES[self.policies.prefill_dispatch]()
        self._loads: dict[str, InstanceLoad] = {}
        self._heard_at: dict[str, float] = {}
        self._unseen: dict[str, deque[Unseen]] = {}
        self._expected: dict[str, dict[str, int]] = {}  # blocks by request on their way to an instance
        self._corrected: dict[str, InstanceLoad] = {}  # what is worked out already

    # ---- reports

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
        self._heard_at[load.instance_id] = self._clock()
        self._corrected.pop(load.instance_id, None)
        unseen = self._unseen.get(load.instance_id)
        while unseen and unseen[0].requests_added <= load.requests_added:
            unseen.popleft()

    def remove(self, instance_id: str) -> None:
        self._loads.pop(instance_id, None)
        self._heard_at.pop(instance_id, None)
        self._unseen.pop(instance_id, None)
        self._expected.pop(instance_id, None)
        self._corrected.pop(instance_id, None)

    # ---- decisions

    def dispatch(self, request: NewRequest, *, may_wait: bool = False) -> str | None:
        """Chooses where a new request starts, and counts it there. None: nowhere.

        Args:
            may_wait: With late binding also None if there is no room for it now.
        """
        able = self._candidates()
        if self.policies.late_binding and able and able[0].role == "neutral":
            roomy = [load for load in able if _blocks(request, load) <= _room(load)]
            if may_wait and not roomy:
                return None
            able = roomy or able
        policy = self._prefill_dispatch if able and able[0].role == "prefill" else self._dispatch
        chosen = policy.choose(able, request, self._rng)
        if chosen is None:
            return None
        # The instance counts what anybody sends it, so the count starts from its own report.
        blocks = _blocks(request, chosen)
        unseen = Unseen(chosen.requests_added + 1, request.prompt_tokens, blocks)
        self._unseen.setdefault(chosen.instance_id, deque()).append(unseen)
        self._corrected.pop(chosen.instance_id, None)
        return chosen.instance_id

    def destinations(self, num_blocks: int, priority: int = 0) -> list[str]:
        """Hand-off candidates for a request of this size, best first."""
        ranked = handoff.destinations(self._fresh(), num_blocks, priority)
        ranked = ranked or handoff.destinations(self._all(), num_blocks, priority)
        return [load.instance_id for load in ranked]

    @property
    def is_serving(self) -> bool:
        """Whether there is anybody to take new requests."""
        return bool(self._candidates())

    @property
    def may_bind(self) -> bool:
        """Whether one more instance may let everybody wait for the sake of a large request. What is
        preempted waits there anyway."""
        able = self._candidates()
        binding = sum(load.waiting > load.preempted for load in able)
        return binding < max(1, int(len(able) * self.policies.max_bound))

    def room(self, instance_id: str) -> int:
        """Blocks that a new request could have there at once; none where no new requests go."""
        load = self.corrected(instance_id)
        return _room(load) if can_start(load) else 0

    def blocks_of(self, instance_id: str, request: NewRequest) -> int:
        """Blocks that the prompt of a request takes there."""
        return _blocks(request, self._loads[instance_id])

    # ---- what reports have not seen

    def free_blocks(self, instance_id: str) -> int:
        """Free blocks of an instance, less what is on its way there."""
        load = self.corrected(instance_id)
        return load.free_blocks - load.expected_blocks

    def expect(self, instance_id: str, request_id: str, num_blocks: int) -> None:
        """A request is on its way to an instance; it counts there until `settled`."""
        self._expected.setdefault(instance_id, {})[request_id] = num_blocks
        self._corrected.pop(instance_id, None)

    def settled(self, instance_id: str, request_id: str) -> None:
        """It has arrived (and is in the reports), or will not."""
        if self._expected.get(instance_id, {}).pop(request_id, None) is not None:
            self._corrected.pop(instance_id, None)

    def corrected(self, instance_id: str) -> InstanceLoad:
        """The latest report of an instance with everything decided since counted in."""
        known = self._corrected.get(instance_id)
        if known is None:
            known = self._corrected[instance_id] = self._correct(self._loads[instance_id])
        return known

    def _correct(self, load: InstanceLoad) -> InstanceLoad:
        unseen = self._unseen.get(load.instance_id)
        if unseen:
            load = replace(
                load,
                requests_added=unseen[-1].requests_added,
                waiting=load.waiting + len(unseen),
                waiting_tokens=load.waiting_tokens + sum(dispatched.tokens for dispatched in unseen),
                waiting_blocks=load.waiting_blocks + sum(dispatched.blocks for dispatched in unseen),
            )
        if expected := self._expected.get(load.instance_id):
            load = load.after_taking(sum(expected.values()), len(expected))
        return load

    def _candidates(self) -> list[InstanceLoad]:
        return candidates(self._fresh()) or candidates(self._all())

    def _all(self) -> list[InstanceLoad]:
        return self._seen(self._loads)

    def _fresh(self) -> list[InstanceLoad]:
        """Instances that report. If none does any more, the fault is rather here: see the callers."""
        oldest = self._clock() - self.policies.max_report_age_s
        return self._seen(name for name, heard_at in self._heard_at.items() if heard_at >= oldest)

    def _seen(self, names: Iterable[str]) -> list[InstanceLoad]:
        return limit_headroom(map(self.corrected, names), self.policies.headroom)


def _blocks(request: NewRequest, load: InstanceLoad) -> int:
    return -(-request.prompt_tokens // load.block_tokens)


def _room(load: InstanceLoad) -> int:
    return load.free_blocks - load.watermark_blocks - load.waiting_blocks - load.expected_blocks
