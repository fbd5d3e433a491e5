"""State of vLLM's model runner that migration reads and writes. Functions for `Executor.collective_rpc`.

They take the executor's worker (a `WorkerWrapperBase`) first and run on the step thread, or, if the workers
have processes of their own, there between two steps.
"""

import logging
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from platform import machine
from typing import Any

import torch
from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from migration.child_process import end_with_parent
from migration.transport.kv_transport import KvRegion
from migration.transport.regions import block_order, divided_by_heads, kv_regions
from migration.transport.worker_server import WorkerServer
from migration.vllm_engine.head_division import heads_of_rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The KV cache of one worker.

    Attributes:
        regions: Its memory, with addresses of the worker's process.
        block_order: See `migration.transport.regions.block_order`; of a head if ranks have different heads.
        attention: See `attention`.
        undivided: Why blocks are not divided by heads; None if they are.
    """

    regions: list[KvRegion]
    block_order: str
    attention: dict[str, str]
    undivided: str | None


def kv_layout(worker: Any, num_blocks: int) -> KvLayout | str:
    """How the worker's KV cache lies in its memory, or why its blocks cannot be moved."""
    tensors = list(_runner(worker).kv_caches)  # of every attention layer; layers may share one
    try:
        regions = kv_regions(tensors, num_blocks)
    except ValueError as error:
        return str(error)
    specs = [group.kv_cache_spec for of_spec in _runner(worker).attn_groups for group in of_spec]
    try:
        heads, total = heads_of_rank(worker.worker.vllm_config, specs, worker.global_rank)
        regions, undivided = divided_by_heads(regions, tensors, num_blocks, heads, total), None
    except ValueError as error:
        total, undivided = 1, str(error)
    order = block_order(tensors, num_blocks, of_a_head=total > 1)
    return KvLayout(regions, order, attention(worker), undivided)


def end_with_instance(worker: Any) -> None:
    """Lets the worker's process end with the step thread: vLLM's workers do not when they hang."""
    end_with_parent()
    # All workers have mapped what vLLM's CPU workers share. Without its name it goes with the last of them,
    # also if they are killed.
    for line in Path("/proc/self/maps").read_text().splitlines():
        if (name := line.rpartition(" ")[2]).startswith("/dev/shm/vllm_dist_"):
            Path(name).unlink(missing_ok=True)


def serve_kv_cache(worker: Any, path: str, num_blocks: int) -> bytes:
    """Starts a transport for the worker's KV cache in the worker's process, and connects it to the instance.

    The process that has allocated memory registers it, as in vLLM's NixlConnector. Reads have a thread of
    their own, so that no step waits for them.

    Args:
        path: A Unix socket on which the instance listens. The rank is sent first, in 4 bytes.

    Returns:
        The transport's endpoint.
    """
    from migration.transport.nixl import SWITCH_INTERVAL_S, NixlTransport

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    layout = kv_layout(worker, num_blocks)
    assert isinstance(layout, KvLayout), layout
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)

    def end(error: BaseException) -> None:
        logger.critical("the transport of worker %d ends: %s", worker.global_rank, error)
        connection.shutdown(socket.SHUT_RDWR)  # the instance notices it, and ends

    transport = NixlTransport(f"worker-{worker.global_rank}", on_failure=end)
    transport.register(layout.regions)
    connection.sendall(worker.global_rank.to_bytes(4))
    WorkerServer(transport, connection).start()
    return transport.endpoint()


def attention(worker: Any) -> dict[str, str]:
    """How the attention layers read and write their blocks, by name of the property.

    CPU kernels pack keys in an order of their own for each instruction set, in blocks of the same shape.
    """
    groups = [group for of_spec in _runner(worker).attn_groups for group in of_spec]
    builders = [builder for group in groups for builder in group.metadata_builders]
    packings = {f"{builder.isa} on {machine()}" for builder in builders if hasattr(builder, "isa")}
    sizes = {group.kernel_block_size or group.kv_cache_spec.block_size for group in groups}
    return {
        "attention backend": ", ".join(sorted({group.backend.get_name() for group in groups})),
        "kernel block size": ", ".join(map(str, sorted(sizes))),
        "packing of keys": ", ".join(sorted(packings)) or "none",
    }


def rng_state(worker: Any, request_id: str) -> bytes | None:
    """State of a request's own generator. Only V1 runners keep one, and only for seeded requests.

    V2 runners draw from (seed, position), which is stateless.
    """
    state = getattr(_runner(worker), "requests", {}).get(request_id)
    generator = getattr(state, "generator", None)
    return None if generator is None else bytes(generator.get_state().numpy().tobytes())


def install_request(
    worker: Any, state: NewRequestData, output_token_ids: list[int], saved_rng_state: bytes | None
) -> None:
    """Gives a V1 runner the state of a request that was decoded elsewhere.

    Without a saved generator state a seeded request's generator is wound forward by sampling once per
    output token, with the runner's own sampler: what that draws differs between platforms.

    Args:
        state: As the scheduler would present a new request, with the data of its multimodal input.

    Source: vllm/v1/worker/gpu_model_runner.py, _update_states.
    """
    runner = _runner(worker)
    params = state.sampling_params
    assert params is not None
    generator = None
    if params.sampling_type == SamplingType.RANDOM_SEED:
        generator = torch.Generator(device=runner.device)
        if saved_rng_state is not None:
            generator.set_state(torch.frombuffer(bytearray(saved_rng_state), dtype=torch.uint8))
        else:
            assert params.seed is not None
            generator.manual_seed(params.seed)
            logits = torch.zeros((1, runner.input_batch.vocab_size), device=runner.device)
            for _ in output_token_ids:
                runner.sampler.topk_topp_sampler(logits, {0: generator}, None, None)
    installed = CachedRequestState(
        req_id=state.req_id,
        prompt_token_ids=state.prompt_token_ids,
        mm_features=state.mm_features,
        sampling_params=params,
        generator=generator,
        block_ids=state.block_ids,
        num_computed_tokens=state.num_computed_tokens,
        output_token_ids=list(output_token_ids),
        lora_request=state.lora_request,
        prompt_embeds=state.prompt_embeds,
        prompt_is_token_ids=state.prompt_is_token_ids,
    )
    runner.requests[state.req_id] = installed
    if runner.uses_mrope:
        runner._init_mrope_positions(installed)


def missing_attributes(worker: Any) -> list[str]:
    """The attributes of a model runner that migration relies on and this one lacks."""
    runner = _runner(worker)
    missing = [f"model_runner.{name}" for name in ("kv_caches", "attn_groups") if not hasattr(runner, name)]
    if not (hasattr(runner, "requests") or hasattr(runner, "req_states")):
        missing.append("model_runner.requests / req_states")
    return missing


def num_requests(worker: Any) -> int:
    """Requests that the runner keeps state for."""
    runner = _runner(worker)
    if hasattr(runner, "requests"):
        return len(runner.requests)
    return int(runner.req_states.num_reqs)


def _runner(worker: Any) -> Any:
    return worker.worker.model_runner
