"""vLLM's list of LoRA adapters at an API server, kept equal to the cluster's."""

from collections.abc import Sequence
from http import HTTPStatus

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest
from vllm.lora.request import LoRARequest

from pd_serve.comm.membership import LoraAdapter
from pd_serve.errors import PdServeError, UnknownTargetError
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
    """Offers the cluster's adapters to the clients of this API server, and unloads them at all.

    vLLM's own `load_lora_adapter` asks the engine client to load, `ClusterCore.add_lora_async`; its
    `unload_lora_adapter` does not ask it.
    """

    def update(present: Sequence[LoraAdapter]) -> None:
        models.lora_requests = {
            adapter.name: LoRARequest(
                adapter.name,
                adapter.number,
                adapter.path,
                adapter.base_model,
                is_3d_lora_weight=adapter.is_3d,
            )
            for adapter in present
        }

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
                status = HTTPStatus.SERVICE_UNAVAILABLE
                return create_error_response(str(refused), "ServiceUnavailableError", status)
            models.lora_requests.pop(name, None)
            return f"Success: LoRA adapter '{name}' removed successfully."

    setattr(models, "unload_lora_adapter", unload)  # noqa: B010
    adapters.follow(update)
