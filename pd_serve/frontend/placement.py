"""Where each request of an API server starts, and where it is handed off to."""

import asyncio
from collections.abc import Callable, Collection, Iterable

from msgspec.structs import replace

from migration.messages import RequestId
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.messages import AddRequest, HandOff
from pd_serve.comm.timing import HANDOFF_RETRY_S
from pd_serve.frontend.accounts import Accounts
from pd_serve.frontend.tracked_request import TrackedRequest
from pd_serve.observe.recorder import RequestRecorder
from router.dispatcher import Dispatcher, QueueAhead
from router.request import Demand, NewRequest
from router.waiting_line import WaitingLine


class RequestPlacement:
    """Sends requests to instances, and requests without room to the waiting line.

    Args:
        clock: Clock of the recorded times, in seconds.
        accounts: With shares, no request goes past those that wait, here or in an instance's own queue.
    """

    def __init__(
        self,
        wire: MessageWire,
        token_endpoint: str,
        dispatcher: Dispatcher,
        recorder: RequestRecorder,
        clock: Callable[[], float],
        accounts: Accounts,
    ) -> None:
        self._wire = wire
        self._token_endpoint = token_endpoint
        self._dispatcher = dispatcher
        self._loads = dispatcher.loads
        self._recorder = recorder
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._accounts = accounts
        self.line = WaitingLine(dispatcher, accounts.shares)

    @property
    def now(self) -> float:
        """Time of the waiting line's clock, in seconds."""
        return self._loop.time()

    @property
    def demand(self) -> Demand:
        """Demand of the waiting line."""
        return self.line.demand

    @property
    def is_serving(self) -> bool:
        """Whether any instance takes new requests."""
        return self._dispatcher.is_serving

    def start(self, request: TrackedRequest) -> bool:
        """Sends a new request to an instance, or to the waiting line if none has room for it.

        Returns False, and does nothing, if no live instance takes requests.
        """
        waits = self._accounts.shares is not None and len(self.line) > 0
        if not waits and self.place(request, may_wait=True):
            return True
        if self._dispatcher.is_serving:
            self.line.add(request.request_id, request.new, self._loop.time())
            return True
        return False

    def first_token_s(
        self, new: NewRequest, waiting: Iterable[TrackedRequest], arriving_tokens: int
    ) -> float | None:
        """Predicts the time to a new request's first token; None while there is nothing to predict from.

        Args:
            waiting: Requests without a first token: those on instances that it goes before do not delay it.
            arriving_tokens: Prompt tokens of requests that arrive with it.
        """
        now = self.now
        place = (new.priority, now + new.arrives_later_s)
        queues: dict[str, QueueAhead] = {}
        for other in waiting:
            if not (owner := other.ledger.owner):
                continue
            behind, waited_s = queues.get(owner, QueueAhead())
            if other.place > place:
                behind += other.new.prompt_tokens
            elif other.new.prompt_tokens <= new.prompt_tokens:
                waited_s = max(waited_s, now - other.arrived_at)
            queues[owner] = QueueAhead(behind, waited_s)
        tokens_ahead = arriving_tokens + self.line.tokens_before(new, now)
        predicted_s = self._dispatcher.first_token_s(new, queues, tokens_ahead)
        return None if predicted_s is None else max(predicted_s, self.line.waited_before(new, now))

    def place(self, request: TrackedRequest, *, may_wait: bool = False, avoid: Collection[str] = ()) -> bool:
        """Sends a request to the instance that it starts on.

        Args:
            may_wait: Whether the request may wait for room in the line.
            avoid: Instances that are not to be chosen.

        Returns:
            Whether it was sent. If not, it has to wait for room, or for an instance that takes requests.
        """
        new = request.new
        if request.ledger.token_ids:  # recomputed, with the tokens generated so far
            new = replace(new, prompt_tokens=request.num_tokens)
        instance_id = self._dispatcher.dispatch(new, may_wait=may_wait, avoid=avoid)
        if instance_id is None:
            return False
        if request.is_new and self._accounts.shares is not None:
            request.payload = self._accounts.in_turn(request.payload)
        request.ledger.owner = instance_id
        role = self._loads[instance_id].role
        self._recorder.dispatched(request.request_id, instance_id, role, self._clock())
        handoff = self._handoff_candidates(request) if role == "prefill" else None
        epoch, tokens = request.ledger.epoch, list(request.ledger.token_ids)
        prefix_from = self._dispatcher.send_prefix(new, instance_id)
        message = AddRequest(request.request_id, self._token_endpoint, epoch, handoff, tokens, prefix_from)
        self._wire.send(instance_id, message, request.payload)
        return True

    def move_by_recompute(self, request: TrackedRequest, destination: str) -> None:
        """Starts a request on another instance, which recomputes its KV cache."""
        epoch, tokens = request.ledger.epoch, list(request.ledger.token_ids)
        message = AddRequest(request.request_id, self._token_endpoint, epoch, None, tokens)
        self._wire.send(destination, message, request.payload)

    def settle(self, request: TrackedRequest, destination: str | None = None) -> None:
        """Removes a request from its destination's projected load: it has arrived, or will not."""
        self._loads.settled(destination or request.destination, request.request_id)

    def hand_off_stranded(self, source: str, request: TrackedRequest) -> None:
        """Hands off a stranded request if an instance has room."""
        if request.ledger.owner != source or self._loop.time() < request.placed_at + HANDOFF_RETRY_S:
            return
        num_blocks = self._blocks_of(request, source)
        for destination in self._destinations(request, num_blocks, source)[:1]:
            if self._loads.free_blocks(destination) > num_blocks:
                request.placed_at = self._loop.time()
                self.settle(request)
                self._expect(request, destination, num_blocks)
                self._wire.send(source, HandOff(RequestId(request.request_id), destination))

    def _handoff_candidates(self, request: TrackedRequest) -> list[str] | None:
        """Destinations, best first. The request counts in the projected load of the first one."""
        if request.ends_with_prefill:
            return None
        num_blocks = self._blocks_of(request, request.ledger.owner)
        candidates = self._destinations(request, num_blocks, request.ledger.owner)
        if candidates:
            self._expect(request, candidates[0], num_blocks)
        return candidates

    def _destinations(self, request: TrackedRequest, num_blocks: int, source: str) -> list[str]:
        new = request.new
        return self._dispatcher.destinations(num_blocks, new.priority, new.prefix_keys, source)

    def _expect(self, request: TrackedRequest, destination: str, num_blocks: int) -> None:
        request.destination = destination
        self._loads.expect(destination, request.request_id, num_blocks)

    def _blocks_of(self, request: TrackedRequest, instance_id: str) -> int:
        """Number of KV blocks for the request's tokens and the next one."""
        return self._loads[instance_id].blocks_for(request.num_tokens + 1)
