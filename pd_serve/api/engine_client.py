"""vLLM's `AsyncLLM` on an engine core of ours.

Everything that a client sees as text (tokenizer, detokenizer, stop strings, logprobs, usage, fan-out of
n > 1) stays vLLM's. Only `engine_core`, the object behind which the engines are, is handed in, so one
`AsyncLLM` serves many instances and a migration moves nothing of the text state.
"""

import asyncio
import dis
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any, Protocol

from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError
from vllm.logger import configure_logging_if_needed
from vllm.renderers import renderer_from_config
from vllm.sampling_params import SamplingParams
from vllm.tracing import init_tracer
from vllm.transformers_utils.config import maybe_register_config_serialize_by_value
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager, load_stat_logger_plugin_factories

from pd_serve.api.cluster_view import ClusterView
from pd_serve.api.overload import mark_submitted
from pd_serve.errors import EngineDeadError, InvalidRequestError, OverloadedError, PdServeError
from pd_serve.observe.recorder import names

_STATUS = {
    EngineDeadError: HTTPStatus.SERVICE_UNAVAILABLE,
    OverloadedError: HTTPStatus.TOO_MANY_REQUESTS,
    InvalidRequestError: HTTPStatus.BAD_REQUEST,
}


class EngineCore(Protocol):
    """What `AsyncLLM` calls on its engine core to serve requests.

    The rest of vLLM's client interface (LoRA, pause, sleep, profile, collective RPC: the async methods of
    `vllm.v1.engine.core_client.EngineCoreClient`) is reached only by the routes that need it. Deriving
    from that class gives each of them a `NotImplementedError`, which vLLM answers with 501.

    Attributes:
        resources: Has a bool `engine_dead`. True refuses every request with 500; for "no instance at the
            moment" leave it False, `check_health` and the 503 of `pd_serve.api.overload` cover that.
        engine_ranks_managed: All values that `EngineCoreOutputs.engine_index` will ever have. One that is
            not listed here ends the output handler, and with it the front end (vLLM's loggers are keyed
            by it), so number instances by reusable slots.
    """

    resources: Any
    engine_ranks_managed: list[int]

    async def get_supported_tasks_async(self) -> tuple[str, ...]: ...
    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Take a request. May raise `PdServeError`; after that, or when cancelled, it gets an abort."""
        ...

    async def get_output_async(self) -> EngineCoreOutputs:
        """The next outputs. An exception here ends the front end: every request fails with it."""
        ...

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """End requests, wherever they are. Unknown and finished ids are ignored; ids may repeat."""
        ...

    async def reset_mm_cache_async(self) -> None: ...
    async def reset_prefix_cache_async(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool: ...
    def dp_engines_running(self) -> bool: ...
    def shutdown(self, timeout: float | None = None) -> None: ...


class ClusterRefusal(GracefulHTTPError):
    """The cluster did not take a request; carries the HTTP status that says why."""


class ClusterAsyncLLM(AsyncLLM):
    """`AsyncLLM` whose engines are a cluster.

    Args:
        check: Looks at every request's parameters before anything else. Raises: InvalidRequestError: no
            engine of this cluster can do that.

    Attributes:
        cluster: Set by `create_app`. While it has no live instance, `/health` and `/ping` answer 503.
    """

    cluster: ClusterView | None = None

    def __init__(
        self,
        vllm_config: VllmConfig,
        engine_core: EngineCore,
        *,
        log_requests: bool,
        log_stats: bool,
        check: Callable[[SamplingParams], None] | None = None,
    ) -> None:
        """Set what `AsyncLLM.__init__` sets, without the engine processes that it would start.

        That constructor makes its engine core itself, with no way to hand one in, so it cannot be called.
        `check_surface` tells when a release of vLLM has an attribute that is missing here.

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
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self.admission_stats = None
        self.output_processor = OutputProcessor(
            self.renderer.tokenizer,
            log_stats=self.log_stats,
            stream_interval=self.scheduler_config.stream_interval,
            tracing_enabled=tracing_endpoint is not None,
        )
        self.engine_core = engine_core
        self._check = check
        self.logger_manager = None
        if self.log_stats:
            self.logger_manager = StatLoggerManager(
                vllm_config=vllm_config,
                engine_idxs=engine_core.engine_ranks_managed,
                custom_stat_loggers=custom_loggers,
                enable_default_loggers=log_stats,
            )
            self.logger_manager.log_engine_initialized()

        # One front end of its own: no sharing of counters or profiles between API processes.
        self._client_count = 1
        self._elastic_ep_lock = asyncio.Lock()
        self.profiler = None
        self._frontend_profiler_injected = False
        self._profile_lock = asyncio.Lock()
        self._profile_session_guard_enabled = True
        self._profile_session_active = False
        self.output_handler = None  # started by the first request, on the loop that serves it

    def generate(self, prompt: Any, sampling_params: SamplingParams, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM, but what no engine can do is refused now, and not by the first step of the generator:
        that is too late for a stream to be anything but a 200."""
        if self._check is not None:
            try:
                self._check(sampling_params)
            except InvalidRequestError as error:
                raise ClusterRefusal(str(error), HTTPStatus.BAD_REQUEST) from error
        return super().generate(prompt, sampling_params, *args, **kwargs)

    async def add_request(self, request_id: str, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM; a refusal by the cluster becomes a response with its status instead of a 500."""
        try:
            return await super().add_request(request_id, *args, **kwargs)
        except PdServeError as error:
            status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), None)
            if status is None:
                raise
            raise ClusterRefusal(str(error), status) from error
        finally:
            mark_submitted()

    async def _add_request(self, request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
        """As in vLLM, but leaves nothing behind when the core refuses, or the client goes away meanwhile.

        vLLM registers the request before it hands it to the core and takes that back only for n > 1: its
        own core never waits there, ours asks for a place first.
        """
        try:
            await super()._add_request(request, *args, **kwargs)
        except BaseException:
            await self.abort(request.request_id, internal=True)
            raise

    async def check_health(self) -> None:
        """Healthy while at least one instance can take requests.

        Only this check knows "no instance": were it `errored`, vLLM would refuse requests with 500, and
        together with a stopped output handler shut the server down. Instances come back; the server stays.
        """
        await super().check_health()
        if self.cluster is not None and self.cluster.num_live == 0:
            raise self.dead_error

    def internal_ids(self, request_id: str) -> list[str]:
        """The ids under which the engines know what a client calls `request_id`, while it is running.

        Args:
            request_id: The internal id itself, the `id` of a response, or a client's `X-Request-Id`.

        Returns:
            One id, none when unknown, or several: n > 1, several prompts, or a reused `X-Request-Id`.
        """
        processor = self.output_processor
        if processor.has_request(request_id):
            return [request_id]
        named = names(request_id)
        found: Iterable[list[str]] = (
            ids for name, ids in processor.external_req_ids.items() if named.fullmatch(name)
        )
        return [internal for ids in found for internal in ids]

    async def abort_all(self) -> None:
        """End every request; each stream gets its last chunk, with finish reason "abort"."""
        await self.abort(list(self.output_processor.request_states), internal=True)


def check_surface() -> list[str]:
    """What this module relies on in vLLM and does not find; empty when the release fits.

    Methods and attributes that we use, and attributes that vLLM's constructor sets and ours does not.
    """
    used: dict[type, tuple[str, ...]] = {
        AsyncLLM: (
            "generate",
            "add_request",
            "_add_request",
            "abort",
            "check_health",
            "_run_output_handler",
            "errored",
        ),
        OutputProcessor: ("has_request", "abort_requests", "add_request", "process_outputs"),
        StatLoggerManager: ("record", "log", "log_engine_initialized"),
    }
    problems = [
        f"{owner.__name__}.{name} is gone"
        for owner, names in used.items()
        for name in names
        if not hasattr(owner, name)
    ]
    for name in ("request_states", "external_req_ids"):
        if name not in _attributes_set(OutputProcessor):
            problems.append(f"OutputProcessor no longer has {name}")
    unset = _attributes_set(AsyncLLM) - _attributes_set(ClusterAsyncLLM) - _SET_ONLY_WHEN_PROFILING
    problems += [f"AsyncLLM has a new attribute {name}" for name in sorted(unset)]
    return problems


_SET_ONLY_WHEN_PROFILING = {"_frontend_profiler_worker_name"}


def _attributes_set(owner: type) -> set[str]:
    """Names of the attributes that a constructor's own code assigns, read from its byte code."""
    code = owner.__init__.__code__  # type: ignore[misc]
    return {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
