"""vLLM's `AsyncLLM` with the cluster as its engine core.

Everything that a client sees as text (tokenizer, detokenizer, stop strings, logprobs, usage, fan-out of
n > 1) is vLLM's. Only the engine core is replaced, so one `AsyncLLM` serves many instances and a migration
moves no text state.
"""

import asyncio
from collections.abc import Callable, Collection
from http import HTTPStatus
from typing import Any
from weakref import WeakKeyDictionary

from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.logger import configure_logging_if_needed
from vllm.renderers import renderer_from_config
from vllm.sampling_params import SamplingParams
from vllm.tracing import init_tracer
from vllm.transformers_utils.config import maybe_register_config_serialize_by_value
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.metrics.loggers import StatLoggerManager, load_stat_logger_plugin_factories

from migration.tasks import BackgroundTasks
from pd_serve.api.cluster_view import ClusterView
from pd_serve.api.identity import client_id
from pd_serve.api.overload import (
    announce,
    announce_tokens,
    charged,
    give_charges_back,
    mark_submitted,
    note_charge,
    note_headers,
    note_refusal,
    was_admitted,
)
from pd_serve.api.request_ids import StemInputProcessor, check_id
from pd_serve.api.resumption import expect_requests
from pd_serve.api.slo import given_slo, refuse_unattainable
from pd_serve.errors import (
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    PdServeError,
    RequestRefusedError,
)
from pd_serve.frontend.accounts import Accounts
from pd_serve.observe.recorder import is_named

_STATUS = {
    EngineDeadError: HTTPStatus.SERVICE_UNAVAILABLE,
    OverloadedError: HTTPStatus.TOO_MANY_REQUESTS,
    InvalidRequestError: HTTPStatus.BAD_REQUEST,
}


class ClusterRefusal(GracefulHTTPError):
    """The cluster refused a request; has the HTTP status of the response."""


class ClusterAsyncLLM(AsyncLLM):
    """`AsyncLLM` for a cluster of instances.

    Args:
        engine_core: See `pd_serve.api.core.ClusterCore`.
        check: Called with the parameters of every request first. Raises `InvalidRequestError` for parameters
            that no engine of this cluster supports.
        accounts: Charged for every request.
        account: Returns the account of the HTTP request of this task.

    Attributes:
        cluster: Set by `create_app`. While it has no live instance, `/health` and `/ping` answer 503.
    """

    cluster: ClusterView | None = None

    def __init__(
        self,
        vllm_config: VllmConfig,
        engine_core: EngineCoreClient,
        *,
        log_requests: bool,
        log_stats: bool,
        check: Callable[[SamplingParams], None] | None = None,
        accounts: Accounts | None = None,
        account: Callable[[], int] = lambda: 0,
    ) -> None:
        """Sets the attributes that `AsyncLLM.__init__` sets, without starting engine processes.

        That constructor always makes its own engine core, so it cannot be called.
        `tests/integration/test_vllm_surface.py` fails when a release of vLLM sets an attribute that is
        missing here.

        Source: vllm/v1/engine/async_llm.py
        """
        configure_logging_if_needed(vllm_config.logging_config)
        maybe_register_config_serialize_by_value()
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.scheduler_config = vllm_config.scheduler_config
        self.observability_config = vllm_config.observability_config
        tracing_endpoint = self.observability_config.otlp_traces_endpoint
        if tracing_endpoint is not None:
            init_tracer("vllm.llm_engine", tracing_endpoint)

        custom_loggers = list(load_stat_logger_plugin_factories())
        self.log_requests = log_requests
        self.log_stats = log_stats or bool(custom_loggers)
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = StemInputProcessor(vllm_config, self.renderer)
        self.admission_stats = None
        self.output_processor = OutputProcessor(
            self.renderer.tokenizer,
            log_stats=self.log_stats,
            stream_interval=self.scheduler_config.stream_interval,
            tracing_enabled=tracing_endpoint is not None,
        )
        self.engine_core = engine_core
        self._check = check
        self._accounts = accounts or Accounts()
        self._account = account
        self._client_ids: WeakKeyDictionary[RequestState, str] = WeakKeyDictionary()
        self._tasks = BackgroundTasks()
        self.logger_manager = None
        if self.log_stats:
            self.logger_manager = StatLoggerManager(
                vllm_config=vllm_config,
                engine_idxs=engine_core.engine_ranks_managed,
                custom_stat_loggers=custom_loggers,
                enable_default_loggers=log_stats,
            )
            self.logger_manager.log_engine_initialized()

        # The only front end of its process: no counters or profiles are shared between API processes.
        self._client_count = 1
        self._elastic_ep_lock = asyncio.Lock()
        self.profiler = None
        self._frontend_profiler_injected = False
        self._profile_lock = asyncio.Lock()
        self._profile_session_guard_enabled = True
        self._profile_session_active = False
        self.output_handler = None  # started by the first request, on the loop that serves it

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Like vLLM's, but refuses what the cluster cannot take before the generator starts.

        Once a stream has started, its status is 200 already.
        """
        if not was_admitted(request_id):
            self.admit(prompt, sampling_params, request_id, kwargs.get("priority", 0))
        return super().generate(prompt, sampling_params, request_id, *args, **kwargs)

    def admit(self, prompt: Any, sampling_params: SamplingParams, request_id: str, priority: int) -> None:
        """Charges a request. Raises: ClusterRefusal: The cluster does not take it."""
        try:
            check_id(request_id)
            announce(sampling_params.n)
            expect_requests(sampling_params.n)
            if self._check is not None:
                self._check(sampling_params)
            tokens = _prompt_tokens(prompt)
            slo = given_slo(sampling_params)
            if self.cluster is not None:
                refuse_unattainable(self.cluster, slo, tokens, priority)
            self._charge(sampling_params.n, tokens * sampling_params.n)
            announce_tokens(tokens * sampling_params.n)
        except PdServeError as error:
            give_charges_back()
            if isinstance(error, RequestRefusedError):
                note_refusal(error)
                note_headers(self._accounts.headers(self._account()))
            raise _as_refusal(error) from error

    def _charge(self, requests: int, tokens: int) -> None:
        """Charges the account of this task. Raises: RequestRefusedError: it has not enough left."""
        accounts, account = self._accounts, self._account()
        if accounts.is_used:
            accounts.take(account, requests, tokens, charged())
            note_charge(lambda: accounts.give_back(account, requests, tokens), requests, tokens)
            note_headers(accounts.headers(account))

    async def add_request(self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        """Like vLLM's, but a refusal by the cluster becomes a response with its own status, not a 500."""
        try:
            return await super().add_request(request_id, prompt, params, *args, **kwargs)
        except PdServeError as error:
            give_charges_back()
            raise _as_refusal(error) from error
        except RecursionError as error:  # of outlines' and lm-format-enforcer's checks of a regex
            give_charges_back()
            raise VLLMValidationError("A value of the request is nested too deeply.") from error
        except Exception:  # bad input that vLLM finds here
            give_charges_back()
            raise
        finally:
            number = getattr(params, "n", 1)
            mark_submitted(number, _prompt_tokens(prompt) * number)

    async def _add_request(self, request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
        """Like vLLM's, but removes the request again if the core refuses it or the client disconnects.

        vLLM registers a request before it passes it to the core, and undoes that only for n > 1. Its own core
        never waits or refuses at this point.
        """
        try:
            await super()._add_request(request, *args, **kwargs)
        except BaseException:
            await self.abort(request.request_id, internal=True)
            raise
        if (state := self.output_processor.request_states.get(request.request_id)) is not None:
            self._client_ids[state] = client_id()

    async def check_health(self) -> None:
        """Raises an error while no instance can take requests.

        `errored` stays False then: vLLM would answer requests with 500, and could shut the server down. The
        server stays up until instances are back.
        """
        await super().check_health()
        if self.cluster is not None and self.cluster.num_live == 0:
            raise self.dead_error

    def internal_ids(self, request_id: str) -> list[str]:
        """The engines' ids of a running request, by any of its names.

        Args:
            request_id: The engines' id itself, the `id` of a response, or a client's `X-Request-Id`.

        Returns:
            One id, none if it is unknown, or several for n > 1, several prompts, or a reused `X-Request-Id`.
        """
        processor = self.output_processor
        if processor.has_request(request_id):
            return [request_id]
        return [
            internal
            for name, ids in processor.external_req_ids.items()
            for internal in ids
            if is_named(request_id, name, self._client_id_of(internal))
        ]

    def _client_id_of(self, internal_id: str) -> str:
        state = self.output_processor.request_states.get(internal_id)
        return "" if state is None else self._client_ids.get(state, "")

    def unavailable(self, request_id: str, why: str) -> None:
        """Answers a request with 503: it has no output yet, and no instance takes it."""
        self._refuse(request_id, ClusterRefusal(why, HTTPStatus.SERVICE_UNAVAILABLE))

    def invalid(self, request_id: str, why: str) -> None:
        """Answers a request with 400, or ends its stream with that error: no engine can serve it."""
        self._refuse(request_id, VLLMValidationError(why))

    def _refuse(self, request_id: str, error: Exception) -> None:
        state = self.output_processor.request_states.get(request_id)
        if state is None or state.queue is None:
            return
        state.queue.put(error)
        whole = state.parent_req.request_id if state.parent_req is not None else request_id  # n > 1
        self._tasks.start(self.abort(whole, internal=True))

    async def abort_named(self, names: Collection[str]) -> int:
        """Ends running requests by any of their names; see `internal_ids`. Returns their number."""
        return await self._end({internal_id for name in names for internal_id in self.internal_ids(name)})

    async def abort_all(self) -> int:
        """Ends every request; each stream gets its last chunk, with finish reason "abort"."""
        return await self._end(self.output_processor.request_states)

    async def _end(self, internal_ids: Collection[str]) -> int:
        ids = list(internal_ids)
        await self.abort(ids, internal=True)
        # vLLM forgets a request with several choices by its own id only.
        parents = self.output_processor.parent_requests.items()
        await self.abort([name for name, parent in parents if not parent.child_requests], internal=True)
        return len(ids)


def _as_refusal(error: PdServeError) -> Exception:
    """The refusal that vLLM answers with the status of an error; the error itself if it has none."""
    status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), None)
    return error if status is None else ClusterRefusal(str(error), status)


def _prompt_tokens(prompt: Any) -> int:
    """Tokens of a rendered prompt; 0 for one that is still a text."""
    if not isinstance(prompt, dict):
        return 0
    ids, embeds = prompt.get("prompt_token_ids"), prompt.get("prompt_embeds")
    if ids is None and embeds is None:
        return 0
    return length_from_prompt_token_ids_or_embeds(ids, embeds)
