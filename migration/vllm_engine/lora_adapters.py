"""LoRA adapters of an engine: loaded when a request that uses one enters, and kept apart from each other."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm.config import LoRAConfig
from vllm.lora.request import LoRARequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from migration.errors import DestinationRefusedError, InvalidRequestError, RefusalCode


class LoadedAdapters:
    """The adapters of one engine. Belongs to the step thread.

    A step that cannot load an adapter, or has two under one name, ends vLLM's engine. Therefore a request
    enters only when its adapter is loaded, and is refused beside one that vLLM would take for the same.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._loaded: dict[int, tuple[str, str]] = {}  # name and path by id

    def load(self, adapter: LoRARequest | None) -> None:
        """Loads a request's adapter, unless it is loaded.

        Raises:
            InvalidRequestError: Another adapter runs under its name or id, or the engine takes none.
            Exception: Of vLLM, for an adapter that cannot be loaded.
        """
        if adapter is None:
            return
        if self._core.vllm_config.lora_config is None:
            raise InvalidRequestError("LoRA adapters are not enabled here")
        identity = (adapter.lora_name, adapter.lora_path)
        for other in _adapters(self._requests()):
            same_id = other.lora_int_id == adapter.lora_int_id
            is_same = same_id and (other.lora_name, other.lora_path) == identity
            if not is_same and (same_id or other.lora_name == adapter.lora_name):
                text = f"adapter {identity} cannot run beside {(other.lora_name, other.lora_path)}"
                raise InvalidRequestError(f"{text}: vLLM tells them apart by name and id")
        loaded = self._core.list_loras()
        self._loaded = {key: value for key, value in self._loaded.items() if key in loaded}
        known = self._loaded.get(adapter.lora_int_id)
        if known != identity and adapter.lora_int_id in loaded:
            self._core.remove_lora(adapter.lora_int_id)
        if known != identity or adapter.load_inplace:
            self._core.add_lora(adapter)
            self._loaded[adapter.lora_int_id] = identity
        adapter.load_inplace = False  # else every step of the request would load it again

    def check_slot(self, adapter: LoRARequest | None) -> None:
        """Raises: DestinationRefusedError: As many others as a batch may have are in use."""
        config = self._core.vllm_config.lora_config
        if adapter is None or config is None:
            return
        scheduler = self._core.scheduler
        migration = scheduler.migration
        taken = _ids(scheduler.running) | _ids(scheduler.kv_holding_waiting)
        taken |= _ids(migration.suspended.values()) | _ids(migration.arriving.values())
        if adapter.lora_int_id not in taken and len(taken) >= config.max_loras:
            text = f"{len(taken)} other LoRA adapters are in use, of {config.max_loras} (--max-loras)"
            raise DestinationRefusedError(RefusalCode.NO_ADAPTER_SLOT, text)

    def _requests(self) -> Iterable[Request]:
        scheduler = self._core.scheduler
        yield from scheduler.requests.values()
        if (migration := getattr(scheduler, "migration", None)) is not None:
            yield from migration.arriving.values()


@contextmanager
def slots_kept(config: LoRAConfig | None, running: list[Request], held: Iterable[Request]) -> Iterator[None]:
    """Keeps room in a step's batch for the adapters of requests that may enter it, or come back, later.

    Args:
        held: Requests that are suspended, or on their way here.
    """
    if config is None:
        yield
        return
    max_loras = config.max_loras
    config.max_loras = max_loras - len(_ids(held) - _ids(running))
    try:
        yield
    finally:
        config.max_loras = max_loras


def _adapters(requests: Iterable[Request]) -> Iterator[LoRARequest]:
    return (request.lora_request for request in requests if request.lora_request is not None)


def _ids(requests: Iterable[Any]) -> set[int]:
    return {adapter.lora_int_id for adapter in _adapters(requests)}
