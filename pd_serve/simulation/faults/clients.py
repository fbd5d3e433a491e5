"""Clients of a cluster with faults: they send requests, and compare each token with an undisturbed run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pd_serve.comm.outputs import OutputBatch
from pd_serve.errors import EngineDeadError, PdServeError
from pd_serve.frontend.frontend import Frontend
from pd_serve.simulated_engine.contents import SegmentPrompt, expected_output
from pd_serve.simulated_engine.outputs import SimulatedPayload
from pd_serve.simulated_engine.settings import SEGMENT_TOKENS
from pd_serve.simulation.faults.process_loop import ProcessLoop, SimulatedProcess
from pd_serve.simulation.faults.schedule import ClientRequest
from router.request import NewRequest

#: A client that was refused (503), or whose API server has died, tries again after this time.
RETRY_S = 1.0


class ApiServerHandle(Protocol):
    """An API server as its clients see it."""

    name: str
    process: SimulatedProcess
    frontend: Frontend


@dataclass(eq=False)
class ClientStream:
    """One try of a client's request.

    Attributes:
        request_id: Differs between tries.
        outcome: "" while it goes on; then "length", "error", "abort", "refused", or "broken" with its API
            server.
        is_closed: The API server has handled the abort.
    """

    number: int
    request_id: str
    expected: list[int]
    api_server: ApiServerHandle
    tokens: list[int] = field(default_factory=list)
    outcome: str = ""
    is_closed: bool = False


class Clients:
    """All clients of a run.

    Args:
        api_servers: Returns the living API servers.
        report: Takes a finding.

    Attributes:
        streams: Every try, by request id.
        failed: Streams that ended with an error.
    """

    def __init__(
        self,
        requests: list[ClientRequest],
        block_tokens: int,
        api_servers: Callable[[], list[ApiServerHandle]],
        report: Callable[[str], None],
        loop: ProcessLoop,
    ) -> None:
        self.requests = requests
        self.streams: dict[str, ClientStream] = {}
        self.failed: list[ClientStream] = []
        self.tainted: set[int] = set()
        self.wrong: set[int] = set()
        self._block_tokens = block_tokens
        self._api_servers = api_servers
        self._report = report
        self._loop = loop
        self._left = set(range(len(requests)))
        self._tries = [0] * len(requests)

    @property
    def unfinished(self) -> list[int]:
        return sorted(self._left)

    def open(self, zero: float) -> None:
        for number, request in enumerate(self.requests):
            self._loop.outside_at(zero + request.arrival_s, self._send, number)

    def stream_of(self, number: int) -> ClientStream | None:
        """The present try of a request; None before its arrival and after its end."""
        stream = self.streams.get(f"{number}.{self._tries[number]}")
        return stream if stream is not None and not stream.outcome else None

    def abort(self, number: int) -> None:
        """The client of a request leaves."""
        self._left.discard(number)
        if (stream := self.stream_of(number)) is not None:
            self._abort(stream)

    def api_server_died(self, api_server: ApiServerHandle) -> None:
        """Its connections break, and their clients send their requests again."""
        for stream in list(self.streams.values()):
            if stream.api_server is api_server and not stream.outcome:
                stream.outcome = "broken"
                self._retry(stream.number)

    # ---- one request

    def _send(self, number: int) -> None:
        if number not in self._left:
            return
        servers = self._api_servers()
        if not servers:
            return self._retry(number)
        request = self.requests[number]
        self._tries[number] += 1
        request_id = f"{number}.{self._tries[number]}"
        server = servers[number % len(servers)]
        prompt = SegmentPrompt(request.prompt_tokens, request.segments, SEGMENT_TOKENS, number)
        expected = expected_output(prompt, request.output_tokens, self._block_tokens)
        stream = self.streams[request_id] = ClientStream(number, request_id, expected, server)
        server.process.call_soon(self._submit, stream, request)

    def _submit(self, stream: ClientStream, request: ClientRequest) -> None:
        """Runs in the process of the API server."""
        if stream.outcome:
            return
        payload = SimulatedPayload(
            request_id=stream.request_id,
            prompt_tokens=request.prompt_tokens,
            max_tokens=request.output_tokens,
            priority=request.priority,
            arrival_s=request.arrival_s,
            segments=request.segments,
            seed=stream.number,
        )
        new = NewRequest(request.prompt_tokens, request.priority, ())
        try:
            stream.api_server.frontend.requests.submit(
                stream.request_id, payload.encode(), new, max_tokens=request.output_tokens
            )
        except EngineDeadError:
            stream.outcome = "refused"
            self._retry(stream.number)
        except PdServeError as error:
            stream.outcome = "error"
            self._report(f"request {stream.request_id} was refused: {error}")
            self._left.discard(stream.number)
        else:
            if request.aborts_after == 0:
                self._loop.outside_at(self._loop.now + 0.05, self.abort, stream.number)

    def _retry(self, number: int) -> None:
        self._loop.outside_at(self._loop.now + RETRY_S, self._send, number)

    def on_batch(self, batch: OutputBatch) -> None:
        """Takes what an API server delivers; runs in its process."""
        for output in batch.outputs:
            stream = self.streams[output.request_id]
            if stream.outcome == "abort" and not stream.is_closed:
                continue
            if stream.outcome:
                self._report(f"request {stream.request_id}: an output after its end ({stream.outcome})")
                continue
            self._take(stream, output.new_token_ids, output.finish_reason)

    def _take(self, stream: ClientStream, new: list[int], finish_reason: object) -> None:
        have = len(stream.tokens)
        stream.tokens += new
        if stream.expected[have : len(stream.tokens)] != new:
            self._wrong(stream, have, new)
        request = self.requests[stream.number]
        if finish_reason is not None:
            stream.outcome = str(finish_reason)
            self._left.discard(stream.number)
            if stream.outcome == "error":
                self.failed.append(stream)
            elif len(stream.tokens) != len(stream.expected):
                text = f"ended with {len(stream.tokens)} of {len(stream.expected)} tokens"
                self._report(f"request {stream.request_id} {text} ({stream.outcome})")
        elif request.aborts_after and len(stream.tokens) >= request.aborts_after:
            self._left.discard(stream.number)
            self._abort(stream)

    def _abort(self, stream: ClientStream) -> None:
        stream.outcome = "abort"

        def abort() -> None:
            stream.api_server.frontend.requests.abort([stream.request_id])
            stream.is_closed = True

        stream.api_server.process.call_soon(abort)

    def _wrong(self, stream: ClientStream, index: int, new: list[int]) -> None:
        if stream.number in self.wrong:
            return
        self.wrong.add(stream.number)
        if stream.number not in self.tainted:
            expected = stream.expected[index : index + len(new)]
            text = f"token {index} is {new[:4]} in place of {expected[:4]}"
            self._report(f"request {stream.request_id}: {text}")
