"""What `bench step` measures, as two arms that do the same: an instance of ours, and vLLM's engine core."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import zmq
import zmq.asyncio

from loadtests.bench.step_clock import RecordedStep
from loadtests.bench.step_engines import EngineProcess, run_instance, run_stock
from migration.messages import InstanceId, RequestId
from pd_serve.comm.membership import MANAGER, ApiServerInfo, InstanceInfo, Membership
from pd_serve.comm.messages import (
    AbortRequests,
    AddRequest,
    Heartbeat,
    ToApiServer,
    ToManager,
    ToScheduler,
)
from pd_serve.comm.requests import Call, MoveRequest
from pd_serve.comm.rpc import Answer, RpcClient
from pd_serve.comm.timing import HEARTBEAT_S
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.errors import PdServeError
from pd_serve.instance.instance_process import InstanceConfig

HOST = "127.0.0.1"
BATCH_SIZE, PROMPT_TOKENS = 256, 32
MOVED, MOVED_PROMPT_TOKENS = 8, 4096

#: Steps of a turn. While requests move, ours has as many as the copies last.
STEPS = 10

OURS, STOCK = "ours", "stock"
POLL_S = 0.05

#: Bound of one turn, in seconds.
TURN_S = 60.0


def full(steps: Sequence[RecordedStep], batch_size: int) -> list[RecordedStep]:
    """The steps in which this number of requests decode."""
    return [step for step in steps if step.requests == step.tokens == batch_size]


# ---- requests


class Requests:
    """Makes requests that decode until they are aborted, the same in both arms."""

    def __init__(self) -> None:
        from vllm.v1.serial_utils import MsgpackEncoder

        self._encoder = MsgpackEncoder()

    def moved(self) -> dict[str, list[bytes]]:
        """Payloads of the requests that move, by id."""
        return self._make("moved", MOVED, MOVED_PROMPT_TOKENS)

    def batch(self, number: int) -> dict[str, list[bytes]]:
        """Those of one round's batch."""
        return self._make(f"round-{number}", BATCH_SIZE, PROMPT_TOKENS)

    def _make(self, name: str, count: int, num_prompt_tokens: int) -> dict[str, list[bytes]]:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        payloads, dice = {}, random.Random(name)
        params = SamplingParams(max_tokens=4000, ignore_eos=True, temperature=0.0)
        for index in range(count):
            request = EngineCoreRequest(
                request_id=f"{name}-{index}",
                prompt_token_ids=[dice.randrange(250) for _ in range(num_prompt_tokens)],
                mm_features=None,
                sampling_params=params,
                pooling_params=None,
                arrival_time=0.0,
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
            payloads[request.request_id] = [bytes(frame) for frame in self._encoder.encode(request)]
        return payloads


async def _steps(engine: EngineProcess, batch_size: int, number: int) -> list[RecordedStep]:
    """This number of steps in which the whole batch decodes."""
    await engine.take()
    steps: list[RecordedStep] = []
    async with asyncio.timeout(TURN_S):
        while len(steps) < number:
            await asyncio.sleep(POLL_S)
            steps += full(await engine.take(), batch_size)
    return steps[:number]


# ---- the arms


class HeldEngineArm:
    """What both arms have: the engine that is measured, which is held between its turns."""

    _engine: EngineProcess

    async def decode(self, number: int, batch_size: int = BATCH_SIZE) -> list[RecordedStep]:
        """This number of steps of the whole batch."""
        await self._engine.ask("go")
        steps = await _steps(self._engine, batch_size, number)
        await self._engine.ask("hold")
        return steps


class StockEngine(HeldEngineArm):
    """vLLM's engine core."""

    name = STOCK

    def __init__(self, engine_args: dict[str, Any]) -> None:
        self._requests = Requests()
        self._socket: Any = zmq.Context.instance().socket(zmq.PULL)
        port: int = self._socket.bind_to_random_port(f"tcp://{HOST}")
        self._engine = EngineProcess(run_stock, engine_args, f"tcp://{HOST}:{port}")
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._engine.start()
        self._reading = asyncio.create_task(self._read())
        await self._engine.ask("add", list(self._requests.moved().values()))
        await _steps(self._engine, MOVED, 2)
        await self._engine.ask("call", "set_aside")
        await self._engine.ask("hold")

    async def stop(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        await self._engine.stop()
        self._socket.close(linger=0)

    async def begin(self, number: int) -> None:
        """Adds the batch, and holds it."""
        self._batch = self._requests.batch(number)
        await self._engine.ask("add", list(self._batch.values()))
        await self.decode(1)

    async def arrive(self) -> list[RecordedStep]:
        """As many steps as a turn has, of the same batch."""
        return await self.decode(STEPS)

    async def leave(self) -> list[RecordedStep]:
        """The same of the batch with the requests that move."""
        await self._engine.ask("call", "put_back")
        return await self.decode(STEPS, BATCH_SIZE + MOVED)

    async def end(self) -> None:
        """Ends the batch. The requests that move go on as many steps as those of ours, about."""
        await self._engine.ask("abort", list(self._batch))
        await self._engine.ask("go")
        await _steps(self._engine, MOVED, STEPS)
        await self._engine.ask("call", "set_aside")
        await self._engine.ask("hold")

    async def _read(self) -> None:
        """Takes outputs, as an API server does, without decoding them."""
        inbox = zmq.asyncio.Socket.from_socket(self._socket)
        while True:
            await inbox.recv_multipart()


class OurEngines(HeldEngineArm):
    """The instance that is measured, and another one that requests come from and leave to."""

    name = OURS

    def __init__(self, engine_args: dict[str, Any], stage_bytes_per_s: float | None) -> None:
        keys = CurveKeys.generate()
        self._requests = Requests()
        self._engine, self._other = (
            EngineProcess(
                run_instance,
                InstanceConfig(name, "neutral", engine_args, HOST, keys, stage_bytes_per_s=stage_bytes_per_s),
            )
            for name in ("measured", "other")
        )
        self._wire, self._manager = Wire("api", HOST, keys), Wire(MANAGER, HOST, keys)
        self._calls = RpcClient(self._wire, Call)
        address = self._wire.listen(ToApiServer, self._on_message)
        self._client = self._wire.listen_for_frames(lambda frames: None)
        self._api_server = ApiServerInfo(address, self._client, "joined")
        self._manager_address = self._manager.listen(ToManager, lambda *message: None)
        self._scheduler_address = self._manager.listen(ToScheduler, lambda *message: None)
        self._telling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        infos = await asyncio.gather(*(engine.start() for engine in (self._engine, self._other)))
        for info in infos:
            self._wire.connect(info.instance_id, info.address)
            self._manager.connect(info.instance_id, info.address)
        self._telling = asyncio.create_task(self._tell(list(infos)))
        await asyncio.sleep(2 * HEARTBEAT_S)
        self._add("other", self._requests.moved())
        await _steps(self._other, MOVED, 2)
        await self._other.ask("hold")

    async def stop(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
        await asyncio.gather(*(engine.stop() for engine in (self._engine, self._other)))
        await self._wire.close()
        await self._manager.close()

    async def begin(self, number: int) -> None:
        """Adds the batch, and holds it."""
        self._batch = self._requests.batch(number)
        await self._engine.ask("go")
        self._add("measured", self._batch)
        await self.decode(1)

    async def arrive(self) -> list[RecordedStep]:
        """The steps of the batch while the other requests come from the other instance."""
        await self._other.ask("go")
        steps = await self._move(BATCH_SIZE, "other", "measured")
        await self.decode(1, BATCH_SIZE + MOVED)
        return steps

    async def leave(self) -> list[RecordedStep]:
        """The steps of the batch with the other requests while these go back."""
        steps = await self._move(BATCH_SIZE + MOVED, "measured", "other")
        await _steps(self._other, MOVED, 1)
        await self._other.ask("hold")
        return steps

    async def end(self) -> None:
        """Ends the batch."""
        self._wire.send("measured", AbortRequests([RequestId(request_id) for request_id in self._batch]))
        await self._engine.ask("go")
        await asyncio.sleep(4 * POLL_S)  # until its last step has ended

    def _add(self, instance_id: str, payloads: dict[str, list[bytes]]) -> None:
        for request_id, payload in payloads.items():
            message = AddRequest(RequestId(request_id), self._client, 0, None, [])
            self._wire.send(instance_id, message, payload)

    async def _move(self, batch_size: int, source: str, destination: str) -> list[RecordedStep]:
        """Moves the long requests. Returns the steps until the batch has changed.

        Raises:
            PdServeError: One has not moved.
        """
        await self._engine.ask("go")
        await self._engine.take()
        calls = [MoveRequest(RequestId(name), InstanceId(destination)) for name in self._requests.moved()]
        records = await asyncio.gather(*(self._calls.call(source, call) for call in calls))
        if refused := [record.why for record in records if not record.committed]:
            raise PdServeError(f"a request has not moved: {refused[0]}")
        steps = full(await self._engine.take(), batch_size)
        await self._engine.ask("hold")
        return steps

    async def _tell(self, infos: list[InstanceInfo]) -> None:
        """Sends the heartbeats of a manager and of an API server."""
        api_servers = {self._wire.name: self._api_server}
        membership = Membership(
            1, self._manager_address, infos, scheduler=self._scheduler_address, api_servers=api_servers
        )
        number = 0
        while True:
            number += 1
            for info in infos:
                self._manager.send(info.instance_id, membership)
                self._wire.send(info.instance_id, Heartbeat(number=number))
            await asyncio.sleep(HEARTBEAT_S)

    def _on_message(self, sender: str, message: object, payload: Sequence[bytes]) -> None:
        if isinstance(message, Answer):
            self._calls.on_answer(sender, message)
