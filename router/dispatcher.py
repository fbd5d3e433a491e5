"""Where requests start, and where prefill instances hand them off to."""

import logging
import math
import random
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

from msgspec.structs import replace

from router.dispatch import DISPATCH, DispatchPolicy, can_start, candidates
from router.dispatch.least_loaded import LeastBacklog
from router.dispatch.soonest import first_token_s
from router.freeness import limit_headroom
from router.handoff import HANDOFF, MAX_DESTINATIONS, FreestDestination, can_receive
from router.load import InstanceLoad
from router.plugins import PolicyError
from router.policies import PolicySet, policy_set
from router.prefix_source import prefix_source
from router.projected_loads import ProjectedLoads
from router.request import NewRequest
from router.session_hints import SessionHints

logger = logging.getLogger(__name__)

#: With fair shares, an instance has at most the prompts of this many of its steps in its own queue; the
#: tokens of a step where it does not say so.
BACKLOG_STEPS, STEP_TOKENS = 2, 2048

P = TypeVar("P")
R = TypeVar("R")


class QueueAhead(NamedTuple):
    """Of an instance's queue, as a new request finds it.

    Attributes:
        tokens_behind: Prompt tokens that the request goes before.
        waited_s: How long the oldest request before it that is no longer has waited.
    """

    tokens_behind: int = 0
    waited_s: float = 0.0


class Dispatcher:
    """Decides by the policies of a set, on projected loads.

    Instances without a fresh report are left out. If no report is fresh, the fault is rather in this
    process, and the last reports count: refusing everything would turn a stall into an outage.

    Args:
        policies: `llumnix` by default.
        rng: For policies that draw.
        clock: Seconds, for the age of reports. None: reports do not age.
        bounds_backlog: New requests wait in line while all instances have a backlog, and their order is
            decided as late as that.

    Attributes:
        loads: Takes the reports of the instances, and what becomes of hand-offs.
    """

    def __init__(
        self,
        policies: PolicySet | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] | None = None,
        *,
        bounds_backlog: bool = False,
    ) -> None:
        self._bounds_backlog = bounds_backlog
        self.policies = policies or policy_set("llumnix")
        self.loads = ProjectedLoads(clock, self.policies.max_report_age_s)
        self._rng = rng or random.Random(0)
        self._dispatch = DISPATCH.make(self.policies.choice("dispatch"))
        self._prefill_dispatch = DISPATCH.make(self.policies.choice("prefill_dispatch"))
        self._handoff = HANDOFF.make(self.policies.choice("handoff"))
        chosen = (self._dispatch, self._prefill_dispatch, self._handoff)
        self.loads.prefixes.is_used = any(getattr(policy, "uses_prefixes", False) for policy in chosen)
        self._sessions = SessionHints()
        self._failed: set[int] = set()  # policies by id

    def dispatch(
        self, request: NewRequest, *, may_wait: bool = False, avoid: Collection[str] = ()
    ) -> str | None:
        """Chooses the instance that a new request starts on, and counts the request there.

        Prefill instances queue requests: a prompt leaves them soon. Beside them, a neutral instance takes
        part while it has room, because what starts there stays.

        Args:
            may_wait: With late binding, choose none if no instance has room now.
            avoid: Instances that are not to be chosen.

        Returns: None if there is no instance to choose.
        """
        tokens = request.prompt_tokens
        loads = self._startable(request, may_wait=may_wait, avoid=avoid)
        if not loads:
            return None
        policy = self._dispatch
        if any(load.role == "prefill" for load in loads):
            policy = self._prefill_dispatch
        chosen = self._decide(policy, LeastBacklog(), lambda policy: self._choose(policy, loads, request))
        to_compute = max(tokens - chosen.cached_tokens - chosen.copied_tokens, 1)
        self.loads.add_dispatch(chosen.instance_id, to_compute, chosen.blocks_for(tokens))
        if request.session:
            self._sessions.note(request.session, chosen.instance_id, tokens)
        return chosen.instance_id

    def first_token_s(
        self, request: NewRequest, queues: Mapping[str, QueueAhead], tokens_ahead: int = 0
    ) -> float | None:
        """Predicts the time to a new request's first token, on the instance where it comes soonest.

        It is the time to compute all prompts up to its own, and at least as long as requests before it have
        waited already: those may wait for memory, which no step time shows.

        Args:
            queues: By instance; none for an instance on which nothing waits.
            tokens_ahead: Prompt tokens that no instance has yet and that go before it, shared by all.

        Returns: None if there is no instance, or one that has measured no prompt yet.
        """
        loads = self._startable(request)
        if not loads or not all(load.prompt_token_s for load in loads):
            return None
        share = tokens_ahead // len(loads)

        def predicted_s(load: InstanceLoad) -> float:
            queue = queues.get(load.instance_id, QueueAhead())
            ahead = replace(load, waiting_tokens=share + max(load.waiting_tokens - queue.tokens_behind, 0))
            return max(first_token_s(ahead, request.prompt_tokens, load.prompt_token_s), queue.waited_s)

        return min(map(predicted_s, loads))

    def send_prefix(self, request: NewRequest, instance_id: str) -> str | None:
        """Counts the prompt's blocks on the instance that it starts on.

        Returns: the instance to copy its prefix from; None if computing it is sooner.
        """
        if not (keys := request.prefix_keys):
            return None
        (reader,) = self._with_cached([self.loads.projected(instance_id)], keys, soon=True)
        holders = self._with_cached(self.loads.fresh(), keys)
        source = prefix_source(holders, reader, self.loads.are_apart)
        self.loads.prefixes.expect(instance_id, keys)
        return source.holder if source is not None else None

    def _choose(
        self, policy: DispatchPolicy, loads: Sequence[InstanceLoad], request: NewRequest
    ) -> InstanceLoad:
        chosen = policy.choose(loads, request, self._rng)
        if chosen is None or chosen.instance_id not in self.loads:
            raise PolicyError(f"it has chosen {chosen}")
        return chosen

    def destinations(
        self, num_blocks: int, priority: int = 0, prefix_keys: Sequence[int] = (), source: str = ""
    ) -> list[str]:
        """Instances to hand a request of this size off to, best first; at most `MAX_DESTINATIONS`.

        Args:
            source: The instance that has the request's blocks.
        """
        ranked = self._ranked(self.loads.fresh(), num_blocks, priority, prefix_keys, source)
        return ranked or self._ranked(self.loads.all(), num_blocks, priority, prefix_keys, source)

    @property
    def is_serving(self) -> bool:
        """Whether any instance takes new requests."""
        return bool(self._candidates())

    @property
    def may_bind(self) -> bool:
        """Whether one more instance may hold up its queue to make room for a large request.

        Preempted requests wait on their instance anyway, and do not count.
        """
        loads = self._candidates()
        binding = sum(load.waiting > load.preempted for load in loads)
        return binding < max(1, int(len(loads) * self.policies.max_bound))

    def admissible_tokens(self, instance_id: str) -> float:
        """Prompt tokens that an instance's own queue has room for."""
        return self._backlog_room(self.loads.projected(instance_id))

    def admissible_blocks(self, instance_id: str) -> float:
        """Blocks that a new request would get at once; 0 if the instance takes no new requests. A prefill
        instance's own queue has room for any."""
        load = self.loads.projected(instance_id)
        takes_new = can_start(load) or any(load.instance_id == instance_id for load in self._candidates())
        if takes_new and load.role == "prefill":
            return math.inf
        return self._admissible_blocks(load) if takes_new else 0

    def _ranked(
        self,
        loads: Sequence[InstanceLoad],
        num_blocks: int,
        priority: int,
        prefix_keys: Sequence[int],
        source: str,
    ) -> list[str]:
        loads = self._with_cached(self._with_headroom(can_receive(loads)), prefix_keys)
        loads = self._with_distance(loads, num_blocks, source)
        ranked = self._decide(
            self._handoff, FreestDestination(), lambda policy: policy.rank(loads, num_blocks, priority)
        )
        return [load.instance_id for load in ranked[:MAX_DESTINATIONS]]

    def _decide(self, policy: P, fallback: P, decide: Callable[[P], R]) -> R:
        """The policy's decision, or that of a built-in one if it fails, which is logged once."""
        try:
            return decide(policy)
        except Exception:  # whatever an own policy does: requests go on
            if id(policy) not in self._failed:
                self._failed.add(id(policy))
                logger.exception("%r fails: %s decides instead", policy, type(fallback).__name__)
            return decide(fallback)

    def _startable(
        self, request: NewRequest, *, may_wait: bool = False, avoid: Collection[str] = ()
    ) -> list[InstanceLoad]:
        """The instances that a new request may start on now, with what they have of its prompt."""
        tokens = request.prompt_tokens
        loads = [load for load in self._candidates() if load.instance_id not in avoid]
        if any(load.role == "prefill" for load in loads):
            if self.policies.decode_prompt_tokens:
                loads += [load for load in self._decoding() if load.instance_id not in avoid]
            loads = [load for load in loads if load.role == "prefill" or self._has_room(load, tokens)]
        ready = self._taking_now(loads, tokens)
        if may_wait and not ready:
            return []
        return self._with_session(self._with_prefixes(ready or loads, request.prefix_keys), request)

    def _taking_now(self, loads: list[InstanceLoad], num_tokens: int) -> list[InstanceLoad]:
        """Those that take a new request before its turn in line has come."""
        if self._bounds_backlog:
            loads = [load for load in loads if self._backlog_room(load) > 0]
        if self.policies.late_binding:
            loads = [load for load in loads if load.role == "prefill" or self._has_room(load, num_tokens)]
        return loads

    def _backlog_room(self, load: InstanceLoad) -> float:
        if not self._bounds_backlog:
            return math.inf
        return BACKLOG_STEPS * (load.step_prompt_tokens or STEP_TOKENS) - load.waiting_tokens

    def _candidates(self) -> list[InstanceLoad]:
        found = candidates(self.loads.fresh()) or candidates(self.loads.all())
        return self._with_headroom(found)

    def _decoding(self) -> list[InstanceLoad]:
        """Decode instances that do not drain."""
        loads = [load for load in self.loads.fresh() if load.role == "decode" and not load.draining]
        return self._with_headroom(loads)

    def _with_prefixes(self, loads: list[InstanceLoad], prefix_keys: Sequence[int]) -> list[InstanceLoad]:
        """The loads with what each instance has of a prompt, or can copy from another one."""
        if not prefix_keys:
            return loads
        holders = self._with_cached(self.loads.fresh(), prefix_keys)
        found = []
        for load in self._with_cached(loads, prefix_keys, soon=True):
            source = prefix_source(holders, load, self.loads.are_apart)
            found.append(
                replace(load, copied_tokens=source.tokens, copy_s=source.seconds) if source else load
            )
        return found

    def _with_session(self, loads: list[InstanceLoad], request: NewRequest) -> list[InstanceLoad]:
        """The loads with what the session's last turn has probably left, where nothing is known for sure."""
        if not request.session or request.prefix_keys:
            return loads
        of, tokens = self._sessions.cached_tokens, request.prompt_tokens
        return [
            replace(load, cached_tokens=cached)
            if (cached := of(request.session, load.instance_id, tokens))
            else load
            for load in loads
        ]

    def _with_cached(
        self, loads: list[InstanceLoad], prefix_keys: Sequence[int], *, soon: bool = False
    ) -> list[InstanceLoad]:
        """The loads with what each instance has of a prompt; see `PrefixIndex.held_tokens`."""
        if not prefix_keys:
            return loads
        prefixes = self.loads.prefixes
        tokens = [prefixes.held_tokens(load.instance_id, prefix_keys, soon=soon) for load in loads]
        return [
            replace(load, cached_tokens=cached) if cached else load
            for load, cached in zip(loads, tokens, strict=True)
        ]

    def _with_distance(self, loads: list[InstanceLoad], num_blocks: int, source: str) -> list[InstanceLoad]:
        """The loads with what a copy to another machine takes longer, if some are on the source's machine.

        The times of all copies are taken together: most instances have few copies of each kind.
        """
        far = self.loads.apart_from(source, [load.instance_id for load in loads])
        if all(far) or not any(far):
            return loads
        far_s = [load.far_block_copy_s for load in loads if load.far_block_copy_s]
        near_s = [load.block_copy_s for load in loads if load.block_copy_s]
        longer_s = statistics.median(far_s) - statistics.median(near_s) if far_s and near_s else 0.0
        if longer_s <= 0:
            return loads
        found = []
        for load, is_far in zip(loads, far, strict=True):
            present = load.blocks_for(load.cached_tokens) if load.cached_tokens else 0
            missing = max(num_blocks - present, 0) if is_far else 0
            found.append(replace(load, copy_s=missing * longer_s) if missing else load)
        return found

    def _with_headroom(self, loads: Sequence[InstanceLoad]) -> list[InstanceLoad]:
        return limit_headroom(loads, self.policies.headroom)

    def _has_room(self, load: InstanceLoad, num_tokens: int) -> bool:
        return load.blocks_for(num_tokens) <= self._admissible_blocks(load)

    def _admissible_blocks(self, load: InstanceLoad) -> float:
        taken = load.watermark_blocks + load.waiting_blocks + load.expected_blocks
        kept = self.policies.kept_blocks * (load.running + load.waiting + load.expected_requests)
        return load.free_blocks - taken - kept
