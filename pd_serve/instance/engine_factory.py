"""Creates the inference engine of an instance. A further engine is a package of its own and a branch here."""

import gc
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from migration.engine_interface import Engine, EngineEvents
from migration.token_span import TokenSpan
from pd_serve.platform.cpu import is_cpu_build
from pd_serve.simulated_engine.settings import EngineSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreOutputs

#: Modules of an instance with vLLM's engine.
ENGINE_MODULES = (
    "migration.vllm_engine.adapter",
    "migration.transport.nixl",
    "pd_serve.instance.llumlet",
    "pd_serve.instance.token_publisher",
)

#: What vLLM itself imports only when an engine for CPUs starts.
CPU_ENGINE_MODULES = (
    "migration.vllm_engine.cpu_worker",
    "vllm.engine.arg_utils",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.executor.uniproc_executor",
)

#: Publishes a step's outputs for one API server: its token endpoint, the outputs as frames in vLLM's
#: encoding, and where each output belongs.
PublishOutputs = Callable[[str, Sequence[Any], list[TokenSpan]], None]


def create_engine(
    engine_args: dict[str, Any],
    simulated: EngineSettings | None,
    publish: PublishOutputs,
    events: EngineEvents,
    keep_ended_s: float = 0.0,
) -> Engine:
    """Creates the engine of an instance, without starting it.

    Args:
        engine_args: Arguments of vLLM's `AsyncEngineArgs`.
        simulated: Settings of a simulated engine, which replaces vLLM's; None for vLLM's.
        publish: Sends outputs to API servers. Called on the engine's step thread if it has one.
        keep_ended_s: Time that ended requests are kept for clients that come back, in seconds.
    """
    if simulated is not None:
        from pd_serve.simulated_engine.vllm_format import make_engine

        return make_engine(simulated, publish, events, keep_ended_s=keep_ended_s)
    from vllm.v1.serial_utils import MsgpackEncoder

    from migration.vllm_engine.adapter import VllmEngine

    encoder = MsgpackEncoder()

    def sink(client: str, outputs: "EngineCoreOutputs", spans: list[TokenSpan]) -> None:
        publish(client, encoder.encode(outputs), spans)

    return VllmEngine(lambda: vllm_config(engine_args), sink, events, keep_ended_s)


def no_handoffs(why: str) -> str:
    """The error of a prefill or decode instance whose engine cannot move requests, for the operator."""
    return (
        f"requests cannot be handed off from prefill to decode instances: {why}; "
        "start with --neutral, or with --allow-no-migration to let the prefill instances decode everything"
    )


def no_moves(why: str, role: str) -> str:
    """What it means, for the operator, that the engine of an instance with this role cannot move requests."""
    if role == "neutral":
        return f"its requests stay until they end, as they cannot move: {why}"
    return f"its requests decode where they were prefilled, as they cannot move; run it --neutral: {why}"


def import_engine(*, simulated: bool) -> None:
    """Imports the modules of an instance; those of vLLM take ten seconds.

    Garbage collection takes a tenth of the time of the imports, and vLLM collects five times during its
    start. Freezing the modules' objects saves 1.4 s of CPU time per instance (measured).
    """
    gc.disable()
    from migration.transport.nixl import SWITCH_INTERVAL_S

    # The step thread, the event loop and the transport's thread switch often.
    sys.setswitchinterval(SWITCH_INTERVAL_S)

    if not simulated:
        for module in ENGINE_MODULES:
            importlib.import_module(module)

    gc.freeze()


def vllm_config(engine_args: dict[str, Any]) -> "VllmConfig":
    """The configuration of an instance's engine. Call it on the thread that runs the engine."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.reasoning import ReasoningParserManager
    from vllm.usage.usage_lib import UsageContext

    if plugin := engine_args.get("reasoning_parser_plugin"):
        # vLLM imports it in its launcher. The configuration asks for the parser by its name.
        ReasoningParserManager.import_reasoning_parser(plugin)
    # Some defaults depend on the context (batch sizes on GPUs): use those of vLLM's server.
    context = UsageContext.ENGINE_CONTEXT if is_cpu_build() else UsageContext.OPENAI_API_SERVER
    return AsyncEngineArgs(**engine_args).create_engine_config(context)
