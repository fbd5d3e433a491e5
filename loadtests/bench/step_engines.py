"""The processes that `bench step` measures: an instance of ours, and vLLM's engine core.

Each has the process to itself, as in service, and obeys the measuring process over a pipe.
"""

import asyncio
import multiprocessing
import queue
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from loadtests.bench.step_clock import RecordedStep, StepClock
from pd_serve.instance.instance_process import Instance, InstanceConfig

#: Bound of an answer, in seconds; the first one comes after the imports and the start of the engine.
START_S, ANSWER_S = 300.0, 60.0


class EngineProcess:
    """One engine's process.

    Args:
        run: Runs the engine; called there with the other end of the pipe and `arguments`.
    """

    def __init__(self, run: Callable[..., None], *arguments: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=run, args=(theirs, *arguments), daemon=True)

    async def start(self) -> Any:
        """Returns what the engine says of itself."""
        await asyncio.to_thread(self._process.start)
        return await self._answer(START_S)

    async def stop(self) -> None:
        """Ends the process."""
        if self._process.pid is not None:
            self._process.terminate()
            await asyncio.to_thread(self._process.join)

    async def take(self) -> list[RecordedStep]:
        """See `StepClock.take`."""
        return [RecordedStep(*step) for step in await self.ask("take")]

    async def ask(self, command: str, *arguments: Any) -> Any:
        """Carries out a command there, and returns its result.

        Raises:
            TimeoutError: It does not answer.
            EOFError: It has died.
        """
        self._pipe.send((command, arguments))
        return await self._answer(ANSWER_S)

    async def _answer(self, timeout_s: float) -> Any:
        if not await asyncio.to_thread(self._pipe.poll, timeout_s):
            raise TimeoutError("an engine's process does not answer")
        return self._pipe.recv()


def serve(pipe: Connection, commands: dict[str, Callable[..., Any]]) -> None:
    """Answers commands until the other end is closed."""
    while True:
        try:
            command, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(commands[command](*arguments))


def _commands_of(clock: StepClock) -> dict[str, Callable[..., Any]]:
    return {"take": clock.take, "hold": clock.hold, "go": clock.go}


# ---- ours


def run_instance(pipe: Connection, config: InstanceConfig) -> None:
    """Runs an instance as its Ray actor does, with the same event loop."""
    import uvloop

    asyncio.Runner(loop_factory=uvloop.new_event_loop).run(_run_instance(pipe, config))


async def _run_instance(pipe: Connection, config: InstanceConfig) -> None:
    instance = Instance()
    info = await instance.start(config)
    clock = StepClock(instance.llumlet.engine.core)  # type: ignore[attr-defined]
    pipe.send(info)
    threading.Thread(target=serve, args=(pipe, _commands_of(clock)), daemon=True).start()
    await instance.wait()


# ---- vLLM's


def run_stock(pipe: Connection, engine_args: dict[str, Any], address: str) -> None:
    """Runs vLLM's engine core with its own busy loop and output thread; requests come over the pipe.

    Args:
        address: Outputs are sent there.
    """
    from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType
    from vllm.v1.engine.core import EngineCore, EngineCoreProc, EngineShutdownState
    from vllm.v1.executor import Executor
    from vllm.v1.request import Request
    from vllm.v1.serial_utils import MsgpackDecoder

    from pd_serve.instance.engine_factory import vllm_config

    class StockCore(EngineCoreProc):  # type: ignore[misc]
        """`EngineCoreProc` without its handshake with a front end, and without its input thread."""

        def __init__(self) -> None:
            self.input_queue: queue.Queue[Any] = queue.Queue()
            self.output_queue: queue.Queue[Any] = queue.Queue()
            self.engine_index = 0
            self.engines_running = self.publish_dp_lb_stats = self.enable_fault_tolerance = False
            self.shutdown_state = EngineShutdownState.RUNNING
            self.process_input_queue_block = True
            config = vllm_config(engine_args)
            EngineCore.__init__(self, config, Executor.get_class(config), log_stats=True)
            sending = threading.Thread(
                target=self.process_output_sockets, args=([address], None, 0), daemon=True
            )
            sending.start()
            self._aside: list[Request] = []

        def set_aside(self) -> None:
            """Takes all requests off the running list, with their blocks."""
            self._aside, self.scheduler.running = self.scheduler.running, []

        def put_back(self) -> None:
            self.scheduler.running += self._aside
            self._aside = []

    core = StockCore()
    decoder = MsgpackDecoder(EngineCoreRequest)
    clock = StepClock(core)

    def add(payloads: Sequence[list[bytes]]) -> None:
        for payload in payloads:
            request = core.preprocess_add_request(decoder.decode(payload))
            core.input_queue.put_nowait((EngineCoreRequestType.ADD, request))

    def abort(request_ids: list[str]) -> None:
        core.input_queue.put_nowait((EngineCoreRequestType.ABORT, request_ids))

    def call(method: str) -> None:
        core.input_queue.put_nowait((EngineCoreRequestType.UTILITY, (0, 0, method, [])))

    pipe.send(None)
    commands = _commands_of(clock) | {"add": add, "abort": abort, "call": call}
    threading.Thread(target=serve, args=(pipe, commands), daemon=True).start()
    core.run_busy_loop()
