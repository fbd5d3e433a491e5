"""The two instances of a case as the check sees them, and the tokens of its requests."""

import asyncio
import itertools
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from tests.gpu import instance


@dataclass
class Output:
    """What a client would have got of a request, by whichever instance.

    Attributes:
        times: When each token left its engine, in seconds.
        instances: Which sent each token.
        logprobs: The values of each token, if asked for.
    """

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    instances: list[str] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    ended: bool = False


class InstanceFailedError(Exception):
    """A call of an instance has failed, or its process has ended."""


class Pair:
    """Two instances, "a" and "b". Belongs to one event loop.

    Args:
        adapter: The directory of a LoRA adapter that all requests have; None for none.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        environment: dict[str, str],
        device: str,
        adapter: str | None = None,
    ) -> None:
        self._adapter = adapter
        # A process that comes from a fork of one with vLLM's modules starts ten seconds earlier. Not with
        # CUDA: an import may have touched it, and it does not survive a fork.
        context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
        if device == "cpu":
            context.set_forkserver_preload(["migration.vllm_engine.adapter", "tests.integration.engine_rig"])
        ours, theirs = zip(context.Pipe(), context.Pipe(), strict=True)
        between = context.Pipe()
        self._loop = asyncio.get_running_loop()
        self._check: dict[str, Connection] = dict(zip("ab", ours, strict=True))
        self._processes: dict[str, BaseProcess] = {}
        for name, end, peer in zip("ab", theirs, between, strict=True):
            target = (name, arguments, environment, end, peer)
            self._processes[name] = context.Process(target=instance.run, args=target, daemon=True)
            self._processes[name].start()
            self._loop.add_reader(self._check[name].fileno(), self._on_frames, name)
        for connection in (*theirs, *between):
            connection.close()
        self._numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._changed = asyncio.Event()
        self.outputs: dict[str, Output] = {}
        self.failure: str | None = None

    async def start(self) -> dict[str, Any]:
        """Loads the models. Returns what the instances are."""
        described, other = await asyncio.gather(self.call("a", "start"), self.call("b", "start"))
        assert described["compatibility"] == other["compatibility"]
        return dict(described)

    async def call(self, name: str, method: str, *arguments: Any) -> Any:
        """Calls a method of an instance. Raises: InstanceFailedError."""
        number, future = next(self._numbers), self._loop.create_future()
        self._calls[number] = future
        try:
            self._check[name].send((number, method, arguments))
        except OSError:
            raise InstanceFailedError(self.failure or f"instance {name} has ended") from None
        return await future

    async def both(self, method: str, *arguments: Any) -> list[Any]:
        return list(await asyncio.gather(*(self.call(name, method, *arguments) for name in "ab")))

    async def add(
        self, name: str, request_id: str, prompt: list[int], params: dict[str, Any], *, handoff: bool = False
    ) -> Output:
        output = self.outputs[request_id] = Output()
        await self.call(name, "add", request_id, prompt, params, handoff, self._adapter)
        return output

    async def tokens(self, output: Output, number: int) -> None:
        """Returns when the client would have so many tokens, or all."""
        await self._until(lambda: len(output.tokens) >= number or output.ended)

    async def finish(self, output: Output) -> Output:
        await self._until(lambda: output.ended)
        return output

    async def rest(self) -> None:
        """Waits until nothing is held. Raises: TimeoutError: with what is."""
        problems: list[Any] = []
        for _ in range(200):
            problems = await self.both("problems")
            if problems == [[], []]:
                return
            await asyncio.sleep(0.05)
        raise TimeoutError(f"not at rest: {problems}")

    def kill(self) -> None:
        """Ends both processes, whatever they do."""
        for name, process in self._processes.items():
            self._loop.remove_reader(self._check[name].fileno())
            process.kill()
            process.join(10)
            self._check[name].close()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self.failure is not None:
                raise InstanceFailedError(self.failure)
            self._changed.clear()
            await self._changed.wait()

    def _on_frames(self, name: str) -> None:
        try:
            while self._check[name].poll():
                self._on_frame(self._check[name].recv())
        except (EOFError, OSError):
            self._loop.remove_reader(self._check[name].fileno())
            self.failure = f"the process of instance {name} has ended"
            for future in self._calls.values():
                if not future.done():
                    future.set_exception(InstanceFailedError(self.failure))
        self._changed.set()

    def _on_frame(self, frame: tuple[Any, ...]) -> None:
        match frame:
            case ("reply", number, value, None):
                self._calls.pop(number).set_result(value)
            case ("reply", number, _, error):
                self._calls.pop(number).set_exception(InstanceFailedError(error))
            case ("tokens", now, name, found):
                for request_id, index, tokens, logprobs, finished in found:
                    output = self.outputs[request_id]
                    if index != len(output.tokens):
                        self.failure = f"token {index} of {request_id} after {len(output.tokens)} tokens"
                    output.tokens += tokens
                    output.times += [now] * len(tokens)
                    output.instances += [name] * len(tokens)
                    output.logprobs += logprobs
                    output.ended |= finished
