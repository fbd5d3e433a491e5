"""The cluster as vLLM's engine-core client, which `AsyncLLM` calls."""

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from msgspec.structs import replace
from vllm.lora.request import LoRARequest
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import EngineCoreClient

from migration.cached_keys import KeyFormat
from pd_serve.api.codec import VllmCodec
from pd_serve.api.engine_client import ClusterRefusal
from pd_serve.api.identity import client_id, session_id
from pd_serve.api.lora_adapters import adapter_of, for_engines
from pd_serve.api.prefix_keys import PrefixKeys
from pd_serve.api.resumption import note_resumed
from pd_serve.api.slo import request_slo
from pd_serve.comm.requests import CallEngine
from pd_serve.errors import PdServeError
from pd_serve.frontend.frontend import Frontend
from router.request import NewRequest
from router.slo import NO_SLO, Slo

logger = logging.getLogger(__name__)


class ClusterCore(EngineCoreClient):
    """Passes requests to the frontend and outputs back to `AsyncLLM`.

    It has no pause, sleep, profile or collective RPC: `pd_serve.api.engine_functions` refuses their routes.

    Args:
        key_format: Returns the format of the keys by which prefixes are found; None if they are not needed.
        slo: Targets of requests without their own.
        account: Returns the account of the HTTP request of this task.

    Attributes:
        resources: With `engine_dead` set, vLLM refuses every request with 500. It stays False while there is
            no instance: `check_health` and the 503 of `pd_serve.api.overload` cover that.
        engine_ranks_managed: All values of `EngineCoreOutputs.engine_index`. vLLM's loggers are keyed by them
            and an unknown one would end its output handler, so instances are numbered by reusable slots.
    """

    def __init__(
        self,
        frontend: Frontend,
        outputs: "asyncio.Queue[EngineCoreOutputs]",
        codec: VllmCodec,
        supported_tasks: tuple[str, ...],
        key_format: Callable[[], KeyFormat | None] = lambda: None,
        slo: Slo = NO_SLO,
        account: Callable[[], int] = lambda: 0,
    ) -> None:
        self.resources = SimpleNamespace(engine_dead=False)
        self.engine_ranks_managed = frontend.instances.slots
        self._frontend = frontend
        self._outputs = outputs
        self._codec = codec
        self._supported_tasks = supported_tasks
        self._key_format = key_format
        self._slo = slo
        self._account = account
        self._prefix_keys = PrefixKeys()

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return self._supported_tasks

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Takes a request. After a `PdServeError`, or when cancelled, it is aborted."""
        if request.lora_request is not None:
            request = replace(request, lora_request=for_engines(request.lora_request))
        num_tokens = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
        keys = self._prefix_keys.of(request, self._key_format())
        parameters = request.sampling_params
        slo = request_slo(parameters, self._slo) if parameters is not None else NO_SLO
        account, session = self._account(), session_id()
        # Keys do not see each other's sessions.
        session = f"{account}/{session}" if session else ""
        new = NewRequest(num_tokens, request.priority, keys, slo, -slo.lead_s, account, session)
        # The order of the engine's queue; vLLM's front end has taken the time for its metrics already.
        request = replace(request, arrival_time=request.arrival_time + new.arrives_later_s)
        max_tokens = parameters.max_tokens if parameters is not None else 0  # pooling
        is_resumed = await self._frontend.adoption.submit(
            request.request_id,
            self._codec.encode_request(request),
            new,
            max_tokens=max_tokens,
            name=request.external_req_id or request.request_id,
            client_id=client_id(),
            trace_headers=request.trace_headers,
        )
        note_resumed(is_resumed)

    async def get_output_async(self) -> EngineCoreOutputs:
        """The next outputs. An exception here would fail every request."""
        return await self._outputs.get()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Ends requests on any instance. Unknown and finished ids are ignored; ids may repeat."""
        self._frontend.requests.abort(request_ids)

    async def add_lora_async(self, lora_request: LoRARequest) -> bool:
        """Loads an adapter on all instances, and offers it at all API servers."""
        adapter = adapter_of(lora_request)
        try:
            await self._frontend.lora_adapters.load(adapter, reload=lora_request.load_inplace)
        except PdServeError as error:  # vLLM takes the path out of it
            logger.error("the LoRA adapter %s=%s cannot be loaded: %s", adapter.name, adapter.path, error)
            raise
        return True

    async def list_loras_async(self) -> set[int]:
        return {number for numbers in await self._ask_all("list_loras") for number in numbers}

    async def reset_mm_cache_async(self) -> None:
        await self._ask_all("reset_mm_cache")

    async def reset_prefix_cache_async(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        return all(await self._ask_all("reset_prefix_cache", reset_running_requests, reset_connector))

    async def reset_encoder_cache_async(self) -> None:
        await self._ask_all("reset_encoder_cache")

    async def is_scheduler_paused_async(self) -> bool:
        return any(await self._ask_all("is_scheduler_paused"))

    async def is_sleeping_async(self) -> bool:
        return any(await self._ask_all("is_sleeping"))

    async def get_weight_version_async(self) -> Any:
        return next(iter(await self._ask_all("get_weight_version")), "default")

    async def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        """Answers of all instances. Raises: ClusterRefusal: One that lives has none."""
        try:
            answers = await self._frontend.instances.call_all(CallEngine(method, list(arguments)))
        except (PdServeError, TimeoutError) as error:
            why = str(error) or "an instance does not answer"
            raise ClusterRefusal(why, HTTPStatus.SERVICE_UNAVAILABLE) from error
        return list(answers.values())

    def dp_engines_running(self) -> bool:
        return True

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to do: the manager stops the instances."""
