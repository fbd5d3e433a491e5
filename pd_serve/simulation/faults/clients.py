"""Clients of a cluster with faults: they send requests, and compare each token with an undisturbed run."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from pd_serve.comm.outputs import OutputBatch
from pd_serve.errors import EngineDeadError, PdServeError
from pd_serve.frontend.frontend import Frontend
from pd_serve.simulated_engine.cached_keys import prompt_keys
from pd_serve.simulated_engine.contents import OutputCheck, SegmentPrompt
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
        num_expected: Number of tokens of the whole output.
        check: Of the tokens that the client has read.
        unread, end: Tokens that a slow reader has not read, and the reason of the end behind them.
        outcome: "" while it goes on; then "length", "error", "abort", "refused", or "broken" with its API
            server.
        is_closed: The API server has handled the abort.
        submission: Hands the request to the API server.
    """

    number: int
    request_id: str
    num_expected: int
    check: OutputCheck
    api_server: ApiServerHandle
    tokens: list[int] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    end: object = None
    is_reading: bool = False
    outcome: str = ""
    is_closed: bool = False
    submission: "asyncio.Task[None] | None" = None


class Clients:
    """All clients of a run.

    Args:
        api_servers: Returns the living API servers.
        report: Takes a finding.
        comes_back: Clients whose API server has died ask for the same request: the ids of all tries have the
            same stem.

    Attributes:
        streams: Every try, by request id.
        num_resumed: Tries that continued a request of another API server.
        failed: Streams that ended with an error.
    """

    def __init__(
        self,
        requests: list[ClientRequest],
        block_tokens: int,
        api_servers: Callable[[], list[ApiServerHandle]],
        report: Callable[[str], None],
        loop: ProcessLoop,
        *,
        sampled: bool = False,
        comes_back: bool = False,
    ) -> None:
        self.num_resumed = 0
        self.requests = requests
        self.streams: dict[str, ClientStream] = {}
        self.failed: list[ClientStream] = []
        self.tainted: set[int] = set()
        self.wrong: set[int] = set()
        self._block_tokens = block_tokens
        self._sampled = sampled
        self._comes_back = comes_back
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
        stream = self.streams.get(self._id_of(number))
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

    def _id_of(self, number: int) -> str:
        """The id of the present try."""
        return f"{number}.{'back-' if self._comes_back else ''}{self._tries[number]}"

    # ---- one request

    def _send(self, number: int) -> None:
        if number not in self._left:
            return
        servers = self._api_servers()
        if not servers:
            return self._retry(number)
        request = self.requests[number]
        self._tries[number] += 1
        request_id = self._id_of(number)
        server = servers[number % len(servers)]
        prompt = SegmentPrompt(request.prompt_tokens, request.segments, SEGMENT_TOKENS, number)
        check = OutputCheck(prompt, self._block_tokens, sampled=self._sampled)
        stream = ClientStream(number, request_id, request.output_tokens, check, server)
        self.streams[request_id] = stream
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
        wanted = stream.api_server.frontend.instances.cached_blocks.format
        keys = tuple(prompt_keys(payload.prompt, wanted.key_tokens)) if wanted is not None else ()
        new = NewRequest(request.prompt_tokens, request.priority, keys)
        if request.aborts_after == 0:
            self._loop.outside_at(self._loop.now + 0.05, self.abort, stream.number)
        if self._comes_back:
            stream.submission = stream.api_server.process.start(self._continue(stream, payload, new))
            return
        with self._refusals(stream):
            stream.api_server.frontend.requests.submit(
                stream.request_id, payload.encode(), new, max_tokens=payload.max_tokens
            )

    async def _continue(self, stream: ClientStream, payload: SimulatedPayload, new: NewRequest) -> None:
        """The request goes on from where it is, if an API server that is gone had begun it."""
        with self._refusals(stream):
            self.num_resumed += await stream.api_server.frontend.adoption.submit(
                stream.request_id, payload.encode(), new, max_tokens=payload.max_tokens
            )

    @contextmanager
    def _refusals(self, stream: ClientStream) -> Iterator[None]:
        try:
            yield
        except EngineDeadError:
            stream.outcome = "refused"
            self._retry(stream.number)
        except PdServeError as error:
            stream.outcome = "error"
            self._report(f"request {stream.request_id} was refused: {error}")
            self._left.discard(stream.number)

    def _retry(self, number: int) -> None:
        self._loop.outside_at(self._loop.now + RETRY_S, self._send, number)

    def on_batch(self, batch: OutputBatch) -> None:
        """Takes what an API server delivers; runs in its process."""
        for output in batch.outputs:
            stream = self.streams[output.request_id]
            if stream.outcome == "abort" and not stream.is_closed:
                continue
            if end := stream.outcome or stream.end:
                self._report(f"request {stream.request_id}: an output after its end ({end})")
                continue
            if (every_s := self.requests[stream.number].reads_every_s) == 0:
                self._take(stream, output.new_token_ids, output.finish_reason)
                continue
            stream.unread += output.new_token_ids
            stream.end = output.finish_reason
            if not stream.is_reading:
                stream.is_reading = True
                self._loop.outside_at(self._loop.now + every_s, self._read, stream)

    def _read(self, stream: ClientStream) -> None:
        """A slow reader reads all that its API server has for it."""
        stream.is_reading = False
        if not stream.outcome:
            new, stream.unread = stream.unread, []
            self._take(stream, new, stream.end)

    def _take(self, stream: ClientStream, new: list[int], finish_reason: object) -> None:
        stream.tokens += new
        if (wrong := stream.check.take(new)) is not None:
            self._wrong(stream, wrong)
        request = self.requests[stream.number]
        if finish_reason is not None:
            stream.outcome = str(finish_reason)
            self._left.discard(stream.number)
            if stream.outcome == "error":
                self.failed.append(stream)
            elif len(stream.tokens) != stream.num_expected:
                text = f"ended with {len(stream.tokens)} of {stream.num_expected} tokens"
                self._report(f"request {stream.request_id} {text} ({stream.outcome})")
        elif request.aborts_after and len(stream.tokens) >= request.aborts_after:
            self._left.discard(stream.number)
            self._abort(stream)

    def _abort(self, stream: ClientStream) -> None:
        stream.outcome = "abort"

        def abort() -> None:
            if stream.submission is not None:
                stream.submission.cancel()
            stream.api_server.frontend.requests.abort([stream.request_id])
            stream.is_closed = True

        stream.api_server.process.call_soon(abort)

    def _wrong(self, stream: ClientStream, index: int) -> None:
        if stream.number in self.wrong:
            return
        self.wrong.add(stream.number)
        if stream.number not in self.tainted:
            text = f"token {index} does not follow from the prompt and the tokens before it"
            self._report(f"request {stream.request_id}: {text}")
