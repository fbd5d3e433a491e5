"""A fast model of a cluster, for plans: runs of equal steps at once, no messages, no single tokens.

It has the batching, dispatch and hand-off of the simulated cluster (`pd_serve.simulation`), which takes a
thousand times as long because it runs the real control plane and checks every token. Balancing moves are left
out: a plan compares layouts, not policies.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pd_serve.planning.fast_instance import FastInstance, FastRequest
from pd_serve.simulated_engine.hardware import Hardware
from pd_serve.simulation.config import TraceRequest
from router.slo import Slo

#: Time of a hand-off besides its copy: messages, and the suspension until the next step of both engines.
HANDOFF_S = 0.002

ARRIVAL, STEPS, COPIED = range(3)


@dataclass(frozen=True, slots=True)
class Layout:
    """How instances are used: `neutral` ones only, or `prefill` and `decode` ones.

    Attributes:
        chunk_tokens: Token budget of a step of the instances that prefill; None for prompts before decodes.
    """

    neutral: int = 0
    prefill: int = 0
    decode: int = 0
    chunk_tokens: int | None = None

    @property
    def is_disaggregated(self) -> bool:
        return self.neutral == 0

    def __str__(self) -> str:
        if self.is_disaggregated:
            return f"{self.prefill} prefill + {self.decode} decode, chunk {self.chunk_tokens}"
        return (
            f"{self.neutral} aggregated, {f'chunk {self.chunk_tokens}' if self.chunk_tokens else 'no chunks'}"
        )


@dataclass(frozen=True, slots=True)
class _Copy:
    """A hand-off: `num_tokens` is the size of the request when its copy began."""

    request: FastRequest
    destination: FastInstance
    num_tokens: int
    done_at: float


class FastRun:
    """One run of a workload on a layout.

    Args:
        warm_up: Number of first requests that do not count.
        max_misses: The run ends as soon as more requests have missed the SLO.

    Attributes:
        requests: Those that count, once the run has ended.
    """

    def __init__(
        self, hardware: Hardware, layout: Layout, slo: Slo, warm_up: int = 0, max_misses: float = math.inf
    ) -> None:
        self.requests: list[FastRequest] = []
        self._hardware = hardware
        self._layout = layout
        self._slo = slo
        self._warm_up = warm_up
        self._max_misses = max_misses
        self._misses = 0
        roles = {"neutral": layout.neutral, "prefill": layout.prefill, "decode": layout.decode}
        instances = [
            FastInstance(role, hardware.engine, layout.chunk_tokens)
            for role, count in roles.items()
            for _ in range(count)
        ]
        self._start = [instance for instance in instances if instance.role != "decode"]
        self._decode = [instance for instance in instances if instance.role == "decode"]
        self._counted_from_s = 0.0
        self._line: deque[FastRequest] = deque()
        self._stranded: deque[tuple[FastInstance, FastRequest]] = deque()
        self._copies: dict[FastInstance, list[_Copy]] = {instance: [] for instance in self._start}
        self._links = dict.fromkeys(instances, 0.0)  # when each is free again
        self._events: list[tuple[float, int, int, object, object]] = []
        self._serial = 0

    def run(self, workload: Sequence[TraceRequest]) -> None:
        """Runs until all requests have ended, or too many have missed the SLO."""
        requests = [FastRequest(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in workload]
        self.requests = requests[self._warm_up :]
        self._counted_from_s = self.requests[0].arrival_s if self.requests else math.inf
        for request in requests:
            self._at(request.arrival_s, ARRIVAL, request)
        handlers: dict[int, Callable[[float, object, object], None]] = {
            ARRIVAL: self._on_arrival,
            STEPS: self._on_steps,
            COPIED: self._on_copied,
        }
        while self._events and self._misses <= self._max_misses:
            now, _, kind, subject, detail = heapq.heappop(self._events)
            handlers[kind](now, subject, detail)

    @property
    def attainment(self) -> float:
        """Share of the requests that met the SLO; below the target if the run ended early."""
        good = sum(request.meets(self._slo) for request in self.requests)
        return good / len(self.requests) if self.requests else 0.0

    # ---- events

    def _at(self, at_s: float, kind: int, subject: object, detail: object = None) -> None:
        self._serial += 1
        heapq.heappush(self._events, (at_s, self._serial, kind, subject, detail))

    def _on_arrival(self, now: float, request: object, _: object) -> None:
        assert isinstance(request, FastRequest)
        if self._layout.is_disaggregated:
            chosen = min(self._start, key=lambda instance: instance.backlog_tokens)
        else:
            freest = [instance for instance in self._start if instance.has_room(request.num_tokens)]
            if not freest:
                self._line.append(request)
                return
            chosen = max(freest, key=lambda instance: instance.dispatch_freeness)
        chosen.enqueue(request)
        self._go_on(chosen, now)

    def _on_steps(self, now: float, instance: object, version: object) -> None:
        assert isinstance(instance, FastInstance)
        if instance.version != version:
            return  # it was cut short
        before = instance.used_tokens
        ended, prefilled = instance.finish(now)
        self._suspend_copied(instance, now)
        self._misses += sum(r.arrival_s >= self._counted_from_s and not r.meets(self._slo) for r in ended)
        for request in prefilled:
            self._hand_off(instance, request, now)
        if instance.used_tokens < before:
            self._on_room(instance, now)
        self._go_on(instance, now)

    def _on_copied(self, now: float, instance: object, detail: object) -> None:
        """A request has arrived at its decode instance."""
        assert isinstance(instance, FastInstance)
        assert isinstance(detail, _Copy)
        instance.arrive(detail.request, detail.num_tokens)
        self._go_on(instance, now)

    # ---- placement

    def _go_on(self, instance: FastInstance, now: float) -> None:
        ends_at = instance.go_on(now)
        if ends_at is not None:
            self._at(ends_at, STEPS, instance, instance.version)

    def _on_room(self, instance: FastInstance, now: float) -> None:
        """An instance has freed blocks: the waiting line and the stranded requests get them."""
        if instance.role == "decode":
            waiting, self._stranded = self._stranded, deque()
            for source, request in waiting:
                self._hand_off(source, request, now)
        elif instance.role == "neutral":
            for request in [r for r in self._line if instance.has_room(r.num_tokens)]:
                if instance.has_room(request.num_tokens):
                    self._line.remove(request)
                    instance.enqueue(request)

    def _hand_off(self, source: FastInstance, request: FastRequest, now: float) -> None:
        """Copies a request to the freest decode instance. Meanwhile it decodes where it is."""
        if math.isfinite(request.last_token_s):
            return  # it was stranded, and has ended
        with_room = [instance for instance in self._decode if instance.has_room(request.num_tokens)]
        if not with_room:
            self._stranded.append((source, request))
            return
        destination = max(with_room, key=lambda instance: instance.freeness)
        destination.expect(request.num_tokens)
        size = request.num_tokens * self._hardware.engine.kv_bytes_per_token
        begins = max(now, self._links[source])
        self._links[source] = begins + size / self._hardware.kv_bytes_per_s
        copied_at = self._links[source] + self._hardware.kv_latency_s
        self._copies[source].append(_Copy(request, destination, request.num_tokens, copied_at))

    def _suspend_copied(self, source: FastInstance, now: float) -> None:
        """Moves the requests on whose copied blocks only the latest tokens are missing."""
        if source not in self._copies:
            return
        copies, self._copies[source] = self._copies[source], []
        for copy in copies:
            if copy.done_at > now and math.isinf(copy.request.last_token_s):
                self._copies[source].append(copy)
            elif source.leave(copy.request):
                self._at(now + self._hardware.kv_latency_s + HANDOFF_S, COPIED, copy.destination, copy)
            else:
                copy.destination.cancel(copy.num_tokens)
