"""Requests that enter, or leave, an engine in the middle of their decoding."""

import asyncio
import itertools
from typing import Any

import msgspec
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder

from migration.errors import DestinationRefusedError, RefusalCode
from migration.messages import FinalState, RequestId
from migration.vllm_engine import worker
from migration.vllm_engine.compatibility import missing_to_continue
from migration.vllm_engine.grammars import refusal
from migration.vllm_engine.lora_adapters import LoadedAdapters
from migration.vllm_engine.migrating_scheduler import entry_status
from migration.vllm_engine.migration_state import Suspended

#: How long a grammar may take to compile before a migration goes on without this destination.
GRAMMAR_S = 30.0


class RequestLoader:
    """Decodes requests, and brings them to the state that they had on another engine."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._decoder = MsgpackDecoder(EngineCoreRequest)
        self._stays = itertools.count()
        self._adapters = LoadedAdapters(core)

    def decode(self, payload: list[bytes]) -> tuple[RequestId, Request]:
        """Decodes a request and starts to compile its grammar, if it has one.

        Returns:
            Its id, and vLLM's request under an id that no other stay of it in this engine has had.
        """
        message: EngineCoreRequest = self._decoder.decode(payload)
        request_id = RequestId(message.request_id)
        message.request_id = f"{request_id}@{next(self._stays)}"
        message.client_index = 0  # clients are told apart by their endpoint
        request, _ = self._core.preprocess_add_request(message)
        return request_id, request

    async def decode_arriving(self, payload: list[bytes], token_ids: list[int]) -> tuple[RequestId, Request]:
        """`decode` for a request that is to migrate here, with the tokens that it has generated so far.

        Raises:
            DestinationRefusedError: It cannot be read, or see `continue_from`.
        """
        try:
            request_id, request = self.decode(payload)
        except (msgspec.MsgspecError, ValueError, TypeError, LookupError) as error:
            text = f"the request cannot be read: {error}"
            raise DestinationRefusedError(RefusalCode.UNSUPPORTED_REQUEST, text) from error
        await self.continue_from(request, token_ids)
        return request_id, request

    def read(self, payload: list[bytes]) -> Request:
        """Decodes a request without any effect in the engine, for the hashes of its blocks."""
        message: EngineCoreRequest = self._decoder.decode(payload)
        return Request.from_engine_core_request(message, self._core.request_block_hasher)

    async def continue_from(self, request: Request, token_ids: list[int]) -> None:
        """Appends the tokens that a request has generated elsewhere, once its grammar is compiled.

        A grammar takes many microseconds for each token, so it does that in a thread beside event loop and
        steps. Without a grammar nothing waits, and calls of the engine stay in order.

        Raises:
            DestinationRefusedError: See `compile_grammar` and `replay`.
        """
        if not request.use_structured_output:
            return self.replay(request, token_ids)
        await self.compile_grammar(request)
        await asyncio.to_thread(self.replay, request, token_ids)

    async def compile_grammar(self, request: Request) -> None:
        """Waits until a structured request's grammar is compiled.

        Raises:
            DestinationRefusedError: It cannot be compiled.
        """
        structured = request.structured_output_request
        if structured is None:
            return
        try:
            async with asyncio.timeout(GRAMMAR_S):
                while not structured.is_grammar_ready:  # noqa: ASYNC110 - vLLM offers nothing to wait on
                    await asyncio.sleep(0.002)
        except TimeoutError:
            text = f"the grammar does not compile within {GRAMMAR_S} s"
            raise DestinationRefusedError(RefusalCode.GRAMMAR, text) from None
        if (why := refusal(request)) is not None:
            raise DestinationRefusedError(RefusalCode.GRAMMAR, why)

    def enter(self, request: Request) -> None:
        """Loads the adapter of a request that is to be queued. Raises: as `LoadedAdapters.load`."""
        self._adapters.load(request.lora_request)

    def arrive(self, request: Request) -> None:
        """The same for a request that is to migrate here.

        Raises:
            DestinationRefusedError: Its adapter cannot be loaded, or is one too many.
        """
        self._adapters.check_slot(request.lora_request)
        try:
            self._adapters.load(request.lora_request)
        except Exception as error:
            text = f"the LoRA adapter cannot be loaded: {error}"
            raise DestinationRefusedError(RefusalCode.ADAPTER, text) from error

    def load_adapter(
        self, name: str, number: int, path: str, base_model: str | None, is_3d: bool, reload: bool
    ) -> None:
        """Loads a LoRA adapter before requests use it. Raises: as `LoadedAdapters.load`.

        Args:
            reload: Whether weights that are loaded are read again.
        """
        self._adapters.load(LoRARequest(name, number, path, base_model, reload, is_3d))

    def replay(self, request: Request, token_ids: list[int]) -> None:
        """Appends output tokens as decoding did, so that a grammar advances with them.

        Raises:
            DestinationRefusedError: The grammar does not accept them.
        """
        if not token_ids:
            return
        if not request.use_structured_output:
            request.append_output_token_ids(token_ids)
            return
        for token_id in token_ids:
            request.append_output_token_ids(token_id)
            if not self._core.structured_output_manager.accept_tokens(request, [token_id]):
                text = "the grammar does not accept the tokens so far"
                raise DestinationRefusedError(RefusalCode.GRAMMAR, text)

    def check_can_continue(self) -> None:
        """Raises: DestinationRefusedError: this vLLM cannot continue a request that was lost elsewhere."""
        if missing := missing_to_continue():
            text = "a lost request cannot be continued: this vLLM lacks " + ", ".join(missing)
            raise DestinationRefusedError(RefusalCode.UNSUPPORTED_ENGINE, text)

    def continue_by_recompute(self, request: Request) -> None:
        """Queues a request that has output tokens but no blocks: its former instance died.

        Any engine can do this, with vLLM's own scheduler, too.
        """
        self.install(request, 0, None)
        queue_for_recompute(self._core.scheduler, request)

    def install(self, request: Request, num_computed_tokens: int, rng_state: bytes | None) -> None:
        """Gives a V1 model runner the request's state; V2 runners take it from the scheduler."""
        if self._core.scheduler.use_v2_model_runner:
            return
        state = NewRequestData(
            req_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            mm_features=request.mm_features,  # with their data, for a recompute after a preemption
            sampling_params=request.sampling_params,
            pooling_params=None,
            block_ids=([],),  # set by the scheduler's output when the request is resumed
            num_computed_tokens=num_computed_tokens,
            lora_request=request.lora_request,
            prompt_embeds=request.prompt_embeds,
            prompt_is_token_ids=request.prompt_is_token_ids,
        )
        self._core.collective_rpc(
            worker.install_request, args=(state, list(request.output_token_ids), rng_state)
        )

    def final_state(self, suspended: Suspended, epoch: int) -> FinalState:
        """What `install` needs elsewhere, with the blocks that are left."""
        request = suspended.request
        return FinalState(
            tail=suspended.tail,
            epoch=epoch,
            output_token_ids=list(request.output_token_ids),
            num_computed_tokens=request.num_computed_tokens,
            # The workers of the last pipeline stage sample, each with the same generators.
            rng_state=self._core.collective_rpc(worker.rng_state, args=(request.request_id,))[-1],
        )


def queue_for_recompute(scheduler: Any, request: Request) -> None:
    """Queues a request that has output tokens, in one of vLLM's schedulers, with migration or without."""
    request.prefill_stats = None  # they have been reported
    request.status = entry_status(scheduler)
    if scheduler.connector is not None:
        # When tokens have been loaded from a KV tier, vLLM resumes only what has been preempted.
        request.num_preemptions += 1
    scheduler.add_request(request)
    request.take_events()  # durations are computed from those of its first queueing
