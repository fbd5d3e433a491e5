"""One instance of the fast model: its queue, its batch, and the run of equal steps in progress."""

import heapq
import math
from collections import deque
from dataclasses import dataclass

from pd_serve.simulated_engine.settings import EngineSettings
from router.slo import Slo

#: Most decode steps that are one run: its requests get longer meanwhile.
MOST_STEPS = 64


@dataclass(slots=True, eq=False)
class FastRequest:
    """A request of the fast model.

    Attributes:
        computed: Tokens whose KV is there.
        generated: Number of output tokens.
        stay: Tells the batch's entry of the request from earlier ones.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    computed: int = 0
    generated: int = 0
    stay: int = 0
    first_token_s: float = math.inf
    last_token_s: float = math.inf

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + self.generated

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first; 0 with one token, infinite if it has not ended."""
        if math.isinf(self.last_token_s):
            return math.inf
        return (self.last_token_s - self.first_token_s) / max(self.output_tokens - 1, 1)

    def meets(self, slo: Slo) -> bool:
        return slo.is_met(self.ttft_s, self.tpot_s)


class FastInstance:
    """Batches as the simulated engine does (`pd_serve.simulated_engine.batcher`), in runs of equal steps.

    Attributes:
        used_tokens: Tokens of KV in use or expected.
        backlog_tokens: Prompt tokens still to be computed.
        version: Of the run in progress; it changes when the run is cut short.
    """

    def __init__(self, role: str, engine: EngineSettings, chunk_tokens: int | None) -> None:
        self.role = role
        self.used_tokens = 0
        self.backlog_tokens = 0
        self.version = 0
        self._engine = engine
        self._chunk_tokens = chunk_tokens
        # Half of each request's last block is empty.
        self._waste = engine.block_tokens // 2
        self._capacity = engine.num_blocks * engine.block_tokens
        self._admitted = int(self._capacity * (1 - engine.watermark))
        self._waiting: deque[FastRequest] = deque()
        self._prefilling: list[FastRequest] = []
        self._joining: list[FastRequest] = []
        self._batch: dict[FastRequest, int] = {}  # the step at whose end each request ends
        self._ends: list[tuple[int, int, int, FastRequest]] = []  # heap of (that step, serial, stay, it)
        self._queued = 0  # tokens of the waiting requests
        self._expected = 0
        self._context = 0  # tokens of the batch
        self._count = 0  # decode steps until now
        self._serial = 0
        self._chunks: list[tuple[FastRequest, int]] = []
        self._decodes = 0
        self._steps = 0  # of the run in progress; 0 if there is none
        self._began = self._step_s = 0.0

    # ---- load

    @property
    def num_requests(self) -> int:
        return len(self._batch) + len(self._prefilling) + len(self._joining) + self._expected

    @property
    def freeness(self) -> float:
        return (self._capacity - self.used_tokens) / max(self.num_requests, 1)

    @property
    def dispatch_freeness(self) -> float:
        requests = self.num_requests + len(self._waiting)
        return (self._capacity - self.used_tokens - self._queued) / max(requests, 1)

    def has_room(self, num_tokens: int) -> bool:
        requests = self.num_requests + len(self._waiting)
        needed = self.used_tokens + self._queued + num_tokens + self._waste * (requests + 1)
        return needed <= self._admitted and requests < self._engine.max_num_seqs

    def expect(self, num_tokens: int) -> None:
        """A request is on its way: its blocks and its place in the batch are reserved."""
        self._expected += 1
        self.used_tokens += num_tokens

    def cancel(self, num_tokens: int) -> None:
        """An expected request of that size does not come."""
        self._expected -= 1
        self.used_tokens -= num_tokens

    def arrive(self, request: FastRequest, expected_tokens: int) -> None:
        """A request that was expected with that many tokens has arrived with its blocks."""
        self._expected -= 1
        self.used_tokens += request.num_tokens - expected_tokens
        self._joining.append(request)

    def leave(self, request: FastRequest) -> bool:
        """Takes a request out of the batch, at the end of a run. Returns False if it is not there."""
        if request not in self._batch:
            return False
        self._take_out(request)
        return True

    def enqueue(self, request: FastRequest) -> None:
        self._waiting.append(request)
        self._queued += request.num_tokens
        self.backlog_tokens += request.num_tokens

    # ---- steps

    def go_on(self, now: float) -> float | None:
        """Begins a run of steps, or cuts a run of decodes short if something waits to join.

        Returns:
            The end of the run that was begun or changed; None if nothing changed.
        """
        if self._steps > 1 and (self._waiting or self._joining):
            steps = max(math.ceil((now - self._began) / self._step_s), 1)
            if steps >= self._steps:
                return None
            self._steps = steps
        elif self._steps or not self._plan():
            return None
        else:
            self._began = now
        self.version += 1
        return self._began + self._steps * self._step_s

    def _plan(self) -> bool:
        """Decides the next run. Returns whether there is one."""
        model = self._engine.cost_model
        self._batch_up()
        self._admit()
        self._chunks = []
        if self._chunk_tokens is None:
            self._chunks = [(request, request.num_tokens - request.computed) for request in self._prefilling]
            self._decodes = 0 if self._chunks else len(self._batch)
        else:
            self._decodes = len(self._batch)
            budget = self._chunk_tokens - self._decodes
            for request in self._prefilling:
                if budget <= 0:
                    break
                chunk = min(budget, request.num_tokens - request.computed)
                self._chunks.append((request, chunk))
                budget -= chunk
        if self._chunks:
            self._steps = 1
            sizes = [(chunk, request.computed) for request, chunk in self._chunks]
            context = self._context if self._decodes else 0
            self._step_s = model.mixed_s(sizes, self._decodes, context)
            return True
        if not self._decodes:
            return False
        room = (self._capacity - self.used_tokens - self._waste * self.num_requests) // self._decodes
        left = (self._next_end() or 0) - self._count
        most = 1 if self.role == "prefill" else MOST_STEPS  # requests leave between two steps
        self._steps = max(min(left, room, most), 1)
        self._step_s = model.decode_s(self._decodes, self._context + self._decodes * self._steps // 2)
        return True

    def _next_end(self) -> int | None:
        """The step at which the next request of the batch ends."""
        while self._ends and self._ends[0][3].stay != self._ends[0][2]:
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else None

    def _batch_up(self) -> None:
        for request in self._joining:
            self._join(request)
        self._joining.clear()
        while self._batch and self.used_tokens + len(self._batch) > self._capacity:
            self._preempt(next(reversed(self._batch)))

    def _join(self, request: FastRequest) -> None:
        self._serial += 1
        request.stay += 1
        end = self._count + request.output_tokens - request.generated
        self._batch[request] = end
        self._context += request.num_tokens
        heapq.heappush(self._ends, (end, self._serial, request.stay, request))

    def _preempt(self, request: FastRequest) -> None:
        """Takes the blocks of the latest request; it is computed again."""
        self._take_out(request)
        request.computed = 0
        self._waiting.appendleft(request)
        self._queued += request.num_tokens
        self.backlog_tokens += request.num_tokens

    def _take_out(self, request: FastRequest) -> None:
        request.generated = request.output_tokens - (self._batch.pop(request) - self._count)
        request.stay += 1
        self._context -= request.num_tokens
        self.used_tokens -= request.num_tokens

    def _admit(self) -> None:
        budget = self._chunk_tokens or self._engine.max_prefill_tokens
        budget -= sum(request.num_tokens - request.computed for request in self._prefilling)
        while self._waiting and budget > 0 and self.num_requests < self._engine.max_num_seqs:
            request = self._waiting[0]
            needed = self.used_tokens + request.num_tokens + self._waste * (self.num_requests + 1)
            if needed > self._admitted and self.num_requests:
                break
            self._waiting.popleft()
            self._queued -= request.num_tokens
            self._prefilling.append(request)
            self.used_tokens += request.num_tokens
            budget -= request.num_tokens

    def finish(self, now: float) -> tuple[list[FastRequest], list[FastRequest]]:
        """Ends the run in progress.

        Returns:
            Requests that have ended, and those that a prefill instance has prefilled.
        """
        ended: list[FastRequest] = []
        prefilled: list[FastRequest] = []
        if self._decodes:
            self._count += self._steps
            grown = self._steps * len(self._batch)
            self._context += grown
            self.used_tokens += grown
            while self._ends and self._next_end() == self._count:
                request = heapq.heappop(self._ends)[3]
                del self._batch[request]
                request.generated = request.output_tokens
                self._context -= request.num_tokens
                self._end(request, now, ended)
        for request, chunk in self._chunks:
            request.computed += chunk
            self.backlog_tokens -= chunk
            if request.computed < request.num_tokens:
                continue
            self._prefilling.remove(request)
            request.first_token_s = min(request.first_token_s, now)
            request.generated += 1
            self.used_tokens += 1
            if request.generated >= request.output_tokens:
                self._end(request, now, ended)
                continue
            self._join(request)
            if self.role == "prefill":
                prefilled.append(request)
        self._steps = 0
        self._chunks = []
        return ended, prefilled

    def _end(self, request: FastRequest, now: float, ended: list[FastRequest]) -> None:
        self.used_tokens -= request.num_tokens
        request.last_token_s = now
        request.stay += 1
        ended.append(request)
