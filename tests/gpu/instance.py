"""One instance of the check, in a process of its own: vLLM's engine, the migration protocol and NIXL.

Two instances of a case have a pipe between them for the messages of the protocol, and one each to the check.
"""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from migration.coordinator import MigrationCoordinator
from migration.engine_interface import EngineEvents
from migration.messages import (
    AnyMigrationMessage,
    InstanceId,
    MigrationMessage,
    RequestDescription,
    RequestId,
)
from migration.token_span import TokenSpan
from migration.transport.nixl import NixlTransport


class ControlledTransport(NixlTransport):
    """NIXL's transport, for negative controls: it can leave the last block of every read out."""

    leaves_out = False

    async def read(
        self, peer: str, endpoint: bytes, remote_blocks: Sequence[int], local_blocks: Sequence[int]
    ) -> int:
        end = -1 if self.leaves_out else None
        return await super().read(peer, endpoint, remote_blocks[:end], local_blocks[:end])


class CheckedInstance:
    """Lives on the event loop of its process.

    To the check it sends ("reply", number, value, error) for each call, and ("tokens", ...) after each step.
    """

    def __init__(self, name: str, arguments: dict[str, Any], check: Connection, peer: Connection) -> None:
        self.name = InstanceId(name)
        self.peer = InstanceId("b" if name == "a" else "a")
        self._arguments = arguments
        self._check, self._to_peer = check, peer
        self._decoder = msgspec.msgpack.Decoder(AnyMigrationMessage)
        self._encoder = msgspec.msgpack.Encoder()
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def serve(self) -> None:
        """Returns when the check has gone, or has called `stop`."""
        self._loop.add_reader(self._check.fileno(), self._on_calls)
        await self._stopped.wait()

    # ---- calls of the check

    async def start(self) -> dict[str, Any]:
        """Loads the model. Returns what the instance is."""
        from migration.vllm_engine.adapter import VllmEngine
        from pd_serve.instance.engine_factory import vllm_config

        sys.setswitchinterval(0.0005)  # as in pd_serve.instance.engine_factory.import_engine
        events = EngineEvents(
            on_prefill_started=self._hand_off,
            on_requests_ended=lambda ids: self.coordinator.requests_ended(ids),
            on_load=lambda load: None,
            on_death=self._die,
        )
        self.engine = VllmEngine(lambda: vllm_config(self._arguments), self._sink, events)
        await self.engine.start()
        if self.engine.no_migration is not None:
            raise RuntimeError(f"no migration: {self.engine.no_migration}")
        self.transport = ControlledTransport(self.name, on_failure=self._die)
        self.transport.register(self.engine.regions)
        self.coordinator = MigrationCoordinator(
            self.name, self.engine, self.transport, self._send, on_failure=self._die
        )
        self._loop.add_reader(self._to_peer.fileno(), self._on_messages)
        regions = self.engine.regions
        config = self.engine.core.vllm_config
        return {
            "memory": "host" if regions[0].device_id < 0 else f"GPU {_gpu_name()}",
            "model_runner": "V2" if config.use_v2_model_runner else "V1",
            "async_scheduling": config.scheduler_config.async_scheduling,
            "regions": len(regions),
            "block_bytes": sum(region.block_bytes for region in regions),
            "compatibility": self.engine.compatibility,
        }

    async def add(
        self, request_id: str, prompt: list[int], params: dict[str, Any], handoff: bool, adapter: str | None
    ) -> None:
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import SamplingParams

        from tests.integration.engine_rig import payload

        lora = LoRARequest("adapter", 1, adapter) if adapter is not None else None
        sampling = SamplingParams(ignore_eos=True, **params)
        frames = payload(request_id, prompt, sampling, lora_request=lora)
        await self.engine.add(frames, "check", handoff=handoff)

    async def migrate(self, request_id: str) -> dict[str, Any]:
        """Moves a request to the other instance. Returns the record of its migration."""
        record = await self.coordinator.migrate(RequestId(request_id), self.peer, "check")
        if not record.committed:
            raise RuntimeError(f"{request_id} did not move: {record.why}")
        return {name: getattr(record, name) for name in ("stages", "blocks", "suspended_ms", "bytes_copied")}

    async def forget(self) -> None:
        """Empties the prefix cache."""
        await self.engine.utility("reset_prefix_cache")

    async def leave_out(self, value: bool) -> None:
        self.transport.leaves_out = value

    async def problems(self) -> list[str]:
        """What is not at rest."""
        held = [f"{request_id} lives" for request_id in await self.engine.live_requests()]
        return held + await self.engine.check_integrity() + self.coordinator.check_integrity()

    async def stop(self) -> None:
        self._stopped.set()

    # ----

    def _on_calls(self) -> None:
        try:
            while self._check.poll():
                number, method, arguments = self._check.recv()
                self._start_task(self._answer(number, method, arguments))
        except (EOFError, OSError):
            os._exit(1)

    async def _answer(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            value, error = await getattr(self, method)(*arguments), None
        except Exception as failure:
            logging.debug("%s of %s has failed", method, self.name, exc_info=True)
            value, error = None, f"{type(failure).__name__}: {failure}"
        self._check.send(("reply", number, value, error))

    def _hand_off(self, started: list[RequestDescription]) -> None:
        for request in started:
            request_id = request.request_id
            migration = self.coordinator.migrate(request_id, self.peer, "handoff", description=request)
            self._start_task(migration)

    def _start_task(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _sink(self, client: str, outputs: Any, spans: list[TokenSpan]) -> None:
        """Called on the step thread, as soon as a step's outputs are there."""
        now, found = time.monotonic(), []
        for output, (_, index, _) in zip(outputs.outputs, spans, strict=True):
            rows = output.new_logprobs.logprobs.tolist() if output.new_logprobs is not None else []
            finished = output.finish_reason is not None
            found.append((output.request_id, index, list(output.new_token_ids), rows, finished))
        self._loop.call_soon_threadsafe(self._check.send, ("tokens", now, self.name, found))

    def _send(self, peer: InstanceId, message: MigrationMessage) -> None:
        self._to_peer.send_bytes(self._encoder.encode(message))

    def _on_messages(self) -> None:
        try:
            while self._to_peer.poll():
                self.coordinator.on_message(self.peer, self._decoder.decode(self._to_peer.recv_bytes()))
        except (EOFError, OSError):
            self._loop.remove_reader(self._to_peer.fileno())  # the other instance has ended

    def _die(self, error: BaseException) -> None:
        logging.error("instance %s has failed", self.name, exc_info=error)
        os._exit(1)


def _gpu_name() -> str:
    import torch

    return str(torch.cuda.get_device_name())


def run(
    name: str, arguments: dict[str, Any], environment: dict[str, str], check: Connection, peer: Connection
) -> None:
    """The process of an instance."""
    os.environ.update(environment)

    async def main() -> None:
        await CheckedInstance(name, arguments, check, peer).serve()

    asyncio.run(main())
    os._exit(0)  # whatever vLLM's threads do
