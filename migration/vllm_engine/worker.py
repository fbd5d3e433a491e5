"""State of vLLM's model runner that migration reads and writes. Functions for `Executor.collective_rpc`.

They take the executor's worker (a `WorkerWrapperBase`) first and run on the step thread.
"""

from typing import Any

import torch
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.worker.gpu_input_batch import CachedRequestState


def kv_caches(worker: Any) -> list[torch.Tensor]:
    """Every attention layer's KV cache; layers may share one."""
    return list(_runner(worker).kv_caches)


def rng_state(worker: Any, request_id: str) -> bytes | None:
    """State of a request's own generator. Only V1 runners keep one, and only for seeded requests.

    V2 runners draw from (seed, position), which is stateless.
    """
    state = getattr(_runner(worker), "requests", {}).get(request_id)
    generator = getattr(state, "generator", None)
    return None if generator is None else bytes(generator.get_state().numpy().tobytes())


def install_request(
    worker: Any,
    request_id: str,
    prompt_token_ids: list[int],
    output_token_ids: list[int],
    sampling_params: SamplingParams,
    num_computed_tokens: int,
    saved_rng_state: bytes | None,
) -> None:
    """Gives a V1 runner the state of a request that was decoded elsewhere.

    Without a saved generator state a seeded request's generator is wound forward by sampling once per
    output token, with the runner's own sampler: what that draws differs between platforms.
    """
    runner = _runner(worker)
    generator = None
    if sampling_params.sampling_type == SamplingType.RANDOM_SEED:
        generator = torch.Generator(device=runner.device)
        if saved_rng_state is not None:
            generator.set_state(torch.frombuffer(bytearray(saved_rng_state), dtype=torch.uint8))
        else:
            assert sampling_params.seed is not None
            generator.manual_seed(sampling_params.seed)
            logits = torch.zeros((1, runner.input_batch.vocab_size), device=runner.device)
            for _ in output_token_ids:
                runner.sampler.topk_topp_sampler(logits, {0: generator}, None, None)
    runner.requests[request_id] = CachedRequestState(
        req_id=request_id,
        prompt_token_ids=prompt_token_ids,
        mm_features=[],
        sampling_params=sampling_params,
        generator=generator,
        block_ids=([],),  # set by the scheduler's output when the request is resumed
        num_computed_tokens=num_computed_tokens,
        output_token_ids=list(output_token_ids),
    )


def num_requests(worker: Any) -> int:
    """Requests that the runner keeps state for."""
    runner = _runner(worker)
    if hasattr(runner, "requests"):
        return len(runner.requests)
    return int(runner.req_states.num_reqs)


def _runner(worker: Any) -> Any:
    return worker.worker.model_runner
