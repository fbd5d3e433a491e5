"""Requests that enter, or leave, an engine in the middle of their decoding."""

import asyncio
import itertools

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder

from migration.errors import DestinationRefusedError, RefusalCode
from migration.messages import FinalState, RequestId
from migration.vllm_engine import worker
from migration.vllm_engine.migrating_scheduler import Suspended

#: How long a grammar may take to compile before a migration goes on without this destination.
GRAMMAR_S = 30.0


class RequestLoader:
    """Decodes requests, and brings them to the state that they had on another engine."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._decoder = MsgpackDecoder(EngineCoreRequest)
        self._stays = itertools.count()

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
        if isinstance(structured.grammar, Exception):
            text = f"the grammar does not compile: {structured.grammar}"
            raise DestinationRefusedError(RefusalCode.GRAMMAR, text)

    def replay(self, request: Request, token_ids: list[int]) -> None:
        """Appends output tokens as decoding did, so that a grammar advances with them.

        Raises:
            DestinationRefusedError: The grammar does not accept them.
        """
        if not request.use_structured_output:
            request.append_output_token_ids(token_ids)
            return
        for token_id in token_ids:
            request.append_output_token_ids(token_id)
            if not self._core.structured_output_manager.accept_tokens(request, [token_id]):
                text = "the grammar does not accept the tokens so far"
                raise DestinationRefusedError(RefusalCode.GRAMMAR, text)

    def install(self, request: Request, num_computed_tokens: int, rng_state: bytes | None) -> None:
        """Gives a V1 model runner the request's state; V2 runners take it from the scheduler."""
        if self._core.scheduler.use_v2_model_runner:
            return
        self._core.collective_rpc(
            worker.install_request,
            args=(
                request.request_id,
                request.prompt_token_ids,
                list(request.output_token_ids),
                request.sampling_params,
                num_computed_tokens,
                rng_state,
            ),
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
