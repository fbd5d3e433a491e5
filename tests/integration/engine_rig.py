"""A real engine with the tiny model, and what is around it in a service: client, llumlet, transport."""

import asyncio
import contextlib
import ctypes
import faulthandler
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import msgspec
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from migration.engine_interface import EngineEvents
from migration.messages import FinalState, MigrationId, RequestDescription, RequestId
from migration.token_span import TokenSpan, crc_of
from migration.vllm_engine.adapter import VllmEngine
from pd_serve.models import resolve
from pd_serve.platform.cpu import cpu_engine_defaults
from router.load import EngineLoad

CLIENT = "client"

# vLLM replaces its kernels in all imported modules, for each engine anew. It does not get through those that
# an engine has imported meanwhile (of torch, numba).
_register_kernels = cache(current_platform.register_triton_kernel_overrides)
setattr(type(current_platform), "register_triton_kernel_overrides", staticmethod(_register_kernels))  # noqa: B010


def tiny_config(**more: Any) -> VllmConfig:
    """Args: `more`: Arguments of vLLM's `AsyncEngineArgs`."""
    torch.set_num_threads(1)  # of this thread, which steps the engine; two would wait for each other
    arguments = (
        cpu_engine_defaults()
        | {
            "model": resolve("tiny"),
            "dtype": "float32",
            "kv_cache_memory_bytes": 32 << 20,
            "max_model_len": 2048,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 256,
            "enable_prefix_caching": False,  # so that all blocks are copied, and nothing else is computed
        }
        | more
    )
    return AsyncEngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)


def payload(
    request_id: str,
    prompt: list[int],
    params: SamplingParams | None = None,
    *,
    pooling_params: PoolingParams | None = None,
    **more: Any,
) -> list[bytes]:
    """A request as an API server sends it; `more`: fields of `EngineCoreRequest`."""
    fields: dict[str, Any] = {
        "request_id": request_id,
        "prompt_token_ids": prompt,
        "mm_features": None,
        "sampling_params": params,
        "pooling_params": pooling_params,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    request = EngineCoreRequest(**fields | more)
    return [bytes(frame) for frame in MsgpackEncoder().encode(request)]


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0, **more)


def seeded(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=1.0, seed=1234, **more)


@dataclass
class Stream:
    """What a client has got of a request."""

    tokens: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)  # of every token
    ended: bool = False
    stop_reason: int | str | None = None
    epoch: int = 0  # what lower ones send is dropped
    logprobs: list[tuple[list[int], list[float]]] = field(
        default_factory=list
    )  # of every token, if asked for
    prompt_logprobs: list[list[float]] = field(default_factory=list)  # of every token but the first
    cached_tokens: int = 0  # of the prompt, that were in the prefix cache


class EngineRig:
    """An engine and all that it says. Made and used on one event loop.

    Args:
        arguments: Of `tiny_config`.

    Attributes:
        on_prefill_started: Called with the requests that are to be handed off and have begun.
        on_requests_ended: Called with the requests that have ended here.
    """

    def __init__(self, **arguments: Any) -> None:
        self.on_prefill_started: Callable[[list[RequestDescription]], None] = lambda started: None
        self.on_requests_ended: Callable[[list[RequestId]], None] = lambda ids: None
        self.streams: dict[str, Stream] = {}
        self.clients: dict[str, str] = {}  # that the last outputs of each request went to
        self.deaths: list[BaseException] = []
        self.ended: list[RequestId] = []
        self.unmovable: dict[str, int] = {}
        self.loads: list[EngineLoad] = []
        self._loop = asyncio.get_running_loop()
        events = EngineEvents(
            on_prefill_started=lambda ids: self.on_prefill_started(ids),
            on_requests_ended=self._end,
            on_load=self.loads.append,
            on_death=self.deaths.append,
            on_unmovable=self.unmovable.update,
        )
        self.engine = VllmEngine(partial(tiny_config, **arguments), self._sink, events)

    def _end(self, request_ids: list[RequestId]) -> None:
        self.ended += request_ids
        self.on_requests_ended(request_ids)

    def _sink(self, client: str, outputs: EngineCoreOutputs, spans: list[TokenSpan]) -> None:
        self._loop.call_soon_threadsafe(self._receive, client, outputs, spans)

    def _receive(self, client: str, outputs: EngineCoreOutputs, spans: list[TokenSpan]) -> None:
        for output, (epoch, index, crc) in zip(outputs.outputs, spans, strict=True):
            self.clients[output.request_id] = client
            stream = self.streams.setdefault(output.request_id, Stream())
            if epoch < stream.epoch:
                continue
            assert index == len(stream.tokens), "a token is lost or doubled"
            assert crc == crc_of(stream.tokens), "a token is another than the one that was sent"
            stream.tokens += output.new_token_ids
            stream.epochs += [epoch] * len(output.new_token_ids)
            stream.ended |= output.finish_reason is not None
            stream.stop_reason = output.stop_reason
            if (logprobs := output.new_logprobs) is not None:
                rows = zip(logprobs.logprob_token_ids, logprobs.logprobs, strict=True)
                stream.logprobs += [(ids.tolist(), values.tolist()) for ids, values in rows]
            if (tensors := output.new_prompt_logprobs_tensors) is not None:
                stream.prompt_logprobs = tensors.logprobs.tolist()
            if (prefill := output.prefill_stats) is not None:
                stream.cached_tokens = prefill.num_cached_tokens

    async def add(self, request_id: str, prompt: list[int], params: SamplingParams, **more: Any) -> Stream:
        stream = self.streams[request_id] = Stream()
        await self.engine.add(payload(request_id, prompt, params), CLIENT, **more)
        return stream

    async def finish(self, stream: Stream) -> list[int]:
        await eventually(lambda: stream.ended)
        return stream.tokens

    async def generate(self, request_id: str, prompt: list[int], params: SamplingParams) -> list[int]:
        """The output of a request that nothing happens to."""
        return await self.finish(await self.add(request_id, prompt, params))

    @contextlib.asynccontextmanager
    async def one_boundary(self) -> AsyncIterator[None]:
        """All calls that are made meanwhile are carried out between the same two steps."""
        submitted = threading.Event()
        self.engine._steps.submit(submitted.wait)  # type: ignore[arg-type]
        try:
            yield
            await asyncio.sleep(0)  # tasks begin
        finally:
            submitted.set()

    async def leave(self, request_id: str, *, release: bool = True) -> "Baggage":
        """Moves a running request out of the engine, and its blocks into a bag."""
        engine = self.engine
        description = await engine.describe(RequestId(request_id))
        bag: dict[int, list[bytes]] = {}
        tokens_done = 0
        while True:
            answer = await engine.next_stage(
                description.request_id,
                description.incarnation,
                tokens_done,
                suspend=len(bag) > 2,
                reader=MigrationId("leaving"),
            )
            part = answer.tail if isinstance(answer, FinalState) else answer
            (run,), tokens_done = part.runs, part.end
            for index, block in enumerate(run.block_ids, run.first):
                bag[index] = self.read_block(block)
            if isinstance(answer, FinalState):
                await engine.unpin(MigrationId("leaving"))
                if release:
                    await engine.release(description.request_id)
                return Baggage(description, answer, [bag[index] for index in range(len(bag))])

    async def come_back(self, baggage: "Baggage", migration_id: str = "m") -> None:
        """Moves it in again."""
        await self.arrive(baggage, migration_id)
        await self.engine.commit(MigrationId(migration_id), baggage.final)

    async def arrive(self, baggage: "Baggage", migration_id: str = "m") -> None:
        """All but the commit; what is in its new blocks before is rubbish."""
        engine, migration = self.engine, MigrationId(migration_id)
        reservation = await engine.reserve(migration, baggage.description)
        (blocks,) = reservation.tables
        if len(blocks) < len(baggage.blocks):
            (blocks,) = await engine.grow(migration, baggage.final.tail.end)
        for block in blocks:
            self.write_block(block, None)
        for block, contents in zip(blocks, baggage.blocks, strict=False):
            self.write_block(block, contents)

    def read_block(self, block: int) -> list[bytes]:
        return [
            ctypes.string_at(region.address + block * region.block_bytes, region.block_bytes)
            for region in self.engine.regions
        ]

    def write_block(self, block: int, contents: Sequence[bytes] | None) -> None:
        for index, region in enumerate(self.engine.regions):
            source = contents[index] if contents is not None else b"\x7f" * region.block_bytes
            ctypes.memmove(region.address + block * region.block_bytes, source, region.block_bytes)

    async def close(self) -> None:
        """Ends the engine, so that another one can be built in this process."""
        await self.engine.stop()
        if self.engine.core is not None:
            await asyncio.to_thread(self.engine.core.shutdown)


@contextlib.asynccontextmanager
async def running_rig(**arguments: Any) -> AsyncIterator[EngineRig]:
    """An `EngineRig` of these arguments, started, whose engine must not die before the end of the block."""
    rig = EngineRig(**arguments)
    await rig.engine.start()
    try:
        yield rig
        assert not rig.deaths
    finally:
        await rig.close()


@dataclass(frozen=True)
class Baggage:
    """A request on its way from nowhere to nowhere."""

    description: RequestDescription
    final: FinalState
    blocks: list[list[bytes]]

    def with_description(self, **changes: Any) -> RequestDescription:
        return msgspec.structs.replace(self.description, **changes)


async def eventually(condition: Any, bound_s: float = 180.0) -> None:
    """Waits, on a machine that others use as well. Shows what all threads do if it is in vain."""
    try:
        async with asyncio.timeout(bound_s):
            while not condition():  # noqa: ASYNC110 - what is waited for is on another thread
                await asyncio.sleep(0.002)
    except TimeoutError:
        faulthandler.dump_traceback()
        raise
