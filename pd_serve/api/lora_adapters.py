"""vLLM's list of LoRA adapters at an API server, kept equal to the cluster's."""

from collections.abc import Sequence
from http import HTTPStatus

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.request import LoRARequest

from pd_serve.comm.membership import LoraAdapter
from pd_serve.errors import EngineDeadError, InvalidRequestError, PdServeError, UnknownTargetError
from pd_serve.frontend.lora_adapters import OfferedAdapters


def adapter_of(request: LoRARequest) -> LoraAdapter:
    return LoraAdapter(
        request.lora_name, request.lora_path, request.base_model_name, request.is_3d_lora_weight
    )


def for_engines(request: LoRARequest) -> LoRARequest:
    """A request's adapter under the name and number that all engines know it by."""
    name, number, path, base_model, is_3d = adapter_of(request).for_engine
    return LoRARequest(name, number, path, base_model, is_3d_lora_weight=is_3d)


def offer_adapters(models: OpenAIServingModels, adapters: OfferedAdapters) -> None:
    """Offers the cluster's adapters to the clients of this API server, and loads and unloads them at all.

    vLLM's own `load_lora_adapter` has loaded what the flags name before, by `ClusterCore.add_lora_async`. It
    would answer every refusal with 500; its `unload_lora_adapter` would not tell the instances.
    """

    def update(present: Sequence[LoraAdapter]) -> None:
        models.lora_requests = {adapter.name: _offered(adapter) for adapter in present}

    async def load(request: LoadLoRAAdapterRequest) -> ErrorResponse | str:
        name = request.lora_name
        async with models.lora_resolver_lock[name]:
            if (error := await models._check_load_lora_adapter_request(request)) is not None:
                return error
            adapter = LoraAdapter(name, request.lora_path, is_3d=request.is_3d_lora_weight)
            try:
                await adapters.load(adapter, reload=request.load_inplace)
            except PdServeError as refused:
                return _refusal(refused, adapter)
            models.lora_requests[name] = _offered(adapter)
            return f"Success: LoRA adapter '{name}' added successfully."

    async def unload(request: UnloadLoRAAdapterRequest) -> ErrorResponse | str:
        name = request.lora_name
        async with models.lora_resolver_lock[name]:
            if (error := await models._check_unload_lora_adapter_request(request)) is not None:
                return error
            try:
                await adapters.unload(name)
            except UnknownTargetError:
                pass  # another API server was asked, too
            except PdServeError as refused:
                return _refusal(refused)
            models.lora_requests.pop(name, None)
            return f"Success: LoRA adapter '{name}' removed successfully."

    setattr(models, "load_lora_adapter", load)  # noqa: B010
    setattr(models, "unload_lora_adapter", unload)  # noqa: B010
    adapters.follow(update)


def _offered(adapter: LoraAdapter) -> LoRARequest:
    """The adapter under the name that clients use."""
    name, path, base_model, is_3d = adapter.name, adapter.path, adapter.base_model, adapter.is_3d
    return LoRARequest(name, adapter.number, path, base_model, is_3d_lora_weight=is_3d)


def _refusal(refused: PdServeError, adapter: LoraAdapter | None = None) -> ErrorResponse:
    """The answer: 404 if the path has no adapter, 500 if it cannot be loaded; the manager's: 400, 503."""
    if isinstance(refused, InvalidRequestError):
        return create_error_response(str(refused))
    if isinstance(refused, EngineDeadError):
        status = HTTPStatus.SERVICE_UNAVAILABLE
        return create_error_response(str(refused), "ServiceUnavailableError", status)
    if adapter is not None and LoRAAdapterNotFoundError.__name__ in str(refused):
        return create_error_response(LoRAAdapterNotFoundError(adapter.name, adapter.path))
    return create_error_response(str(refused), "InternalServerError", HTTPStatus.INTERNAL_SERVER_ERROR)
