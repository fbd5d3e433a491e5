"""vLLM's worker for CPUs with six corrections, of which every worker process makes one by its name."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.v1.sample import rejection_sampler
from vllm.v1.worker.cpu_worker import CPUWorker


class CorrectedCpuWorker(CPUWorker):
    """See the methods for what is corrected."""

    def __init__(self, vllm_config: VllmConfig, *arguments: Any, **named: Any) -> None:
        """Extends `--enforce-eager` to the few helpers that vLLM compiles nevertheless.

        The first request with logprobs would wait seconds for the C++ compiler, and with it every other
        request of its instance. Source: vllm/v1/sample/ops/logprobs.py, batched_count_greater_than.
        """
        if vllm_config.model_config.enforce_eager:
            torch.compiler.set_stance("force_eager")
        if vllm_config.lora_config is not None:
            keep_rows_without_adapter()
        if vllm_config.speculative_config is not None:
            rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
        super().__init__(vllm_config, *arguments, **named)

    def load_model(self, *arguments: Any, **named: Any) -> None:
        """See `compute_prompts_with_own_adapters`."""
        super().load_model(*arguments, **named)
        if self.vllm_config.lora_config is not None and not self.use_v2_model_runner:
            compute_prompts_with_own_adapters(self.model_runner)

    def compile_or_warm_up_model(self) -> Any:
        """Makes the buffers of a later pipeline stage, which vLLM makes while it warms up.

        Without compilation and with an explicit size of the KV cache vLLM does not warm up, and the first
        request would end the engine. Source: vllm/v1/worker/cpu_worker.py, _should_warm_up_model, and
        gpu_model_runner.py, _dummy_run.
        """
        runner: Any = self.model_runner
        if not get_pp_group().is_first_rank and getattr(runner, "intermediate_tensors", self) is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )
        return super().compile_or_warm_up_model()

    def sample_tokens(self, grammar_output: Any) -> Any:
        """A prompt computed in chunks draws nothing from its request's generator until its last chunk.

        vLLM samples after every chunk, throws the token away and winds the generator back by its offset,
        which a CPU generator does not have: a seeded request with a chunked prompt would end the engine.
        Here the generator is out of the batch while such a token is sampled.

        Source: vllm/v1/worker/gpu_model_runner.py, _bookkeeping_sync (set_offset).
        """
        if self.use_v2_model_runner:
            return super().sample_tokens(grammar_output)
        runner: Any = self.model_runner
        batch = runner.input_batch
        unfinished = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0].tolist()
        kept_out = {row: batch.generators.pop(row) for row in unfinished if row in batch.generators}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            batch.generators.update(kept_out)


def expand_batch_to_tokens(
    values: torch.Tensor,
    cumulative_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """Each request's temperature, top_k or top_p, once for each of its drafts.

    vLLM's operation for CPUs writes them to a copy, as integers: on engines that speculate, each request in a
    batch with a sampled one, greedy ones too, had whatever temperature was in that memory before.

    Args:
        values: Of the requests. [num_requests]
        cumulative_tokens: Number of drafts of each request and all before it. [num_requests]
        num_tokens: Number of all drafts.
        replace_from, replace_to: Values of the first kind become the second.

    Source: vllm/v1/sample/rejection_sampler.py; vllm/utils/cpu_triton_utils.py, _expand_kernel_impl.
    """
    counts = torch.diff(cumulative_tokens, prepend=cumulative_tokens.new_zeros(1))
    replaced = values.masked_fill(values == replace_from, replace_to)
    return replaced.repeat_interleave(counts, output_size=num_tokens)


def keep_rows_without_adapter() -> None:
    """LoRA adapters leave the rows of other requests in their batch alone.

    A row without an adapter has the index -1, and vLLM's operations for CPUs read the last slot for it: with
    as many adapters in use as `--max-loras` allows, the base model answered with one of them.

    Source: vllm/lora/ops/torch_ops/lora_ops.py; vllm/lora/punica_wrapper/punica_cpu.py, which imports them.
    """
    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
        operation = getattr(lora_ops, name)
        if not hasattr(operation, "__wrapped__"):  # by the worker of another engine in this process
            for module in (lora_ops, punica_cpu):
                setattr(module, name, _of_rows_with_adapter(operation))


def _of_rows_with_adapter(operation: Callable[..., None]) -> Callable[..., None]:
    """The operation with zeros as the input of rows without an adapter, so that it adds zeros to them."""

    @wraps(operation)
    def corrected(
        inputs: torch.Tensor,
        weights: torch.Tensor,
        output: torch.Tensor,
        adapters: torch.Tensor,
        *more: Any,
        **named: Any,
    ) -> None:
        has_none = (adapters < 0).unsqueeze(1)
        operation(inputs.masked_fill(has_none, 0), weights, output, adapters, *more, **named)

    return corrected


def compute_prompts_with_own_adapters(runner: Any) -> None:
    """The log probabilities of a prompt's tokens are those of its request's adapter.

    vLLM takes the adapters of the batch's requests for the rows of the prompt, one after another. With other
    requests in the batch their number is another, and the operation for CPUs ends the engine.

    Source: vllm/v1/worker/gpu_model_runner.py, _get_prompt_logprobs_dict; vllm/lora/punica_wrapper.
    """
    of_all_prompts = runner._get_prompt_logprobs_dict

    def of_own_adapters(hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        if not runner.num_prompt_logprobs:
            return of_all_prompts(hidden_states, num_scheduled_tokens)
        model, compute = runner.model, runner.model.compute_logits
        wrappers = runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()
        kept = [(wrapper, wrapper.sampler_indices.clone()) for wrapper in wrappers]

        def compute_logits(rows: torch.Tensor) -> torch.Tensor:
            # These are rows of the batch's hidden states, and each of them is a token's.
            first = (rows.data_ptr() - hidden_states.data_ptr()) // hidden_states[:1].nbytes
            for wrapper, _ in kept:
                _set_adapters(wrapper, wrapper.token_lora_indices[first : first + len(rows)])
            return compute(rows)

        model.compute_logits = compute_logits
        try:
            return of_all_prompts(hidden_states, num_scheduled_tokens)
        finally:
            del model.compute_logits
            for wrapper, adapters in kept:
                _set_adapters(wrapper, adapters)

    runner._get_prompt_logprobs_dict = of_own_adapters


def _set_adapters(wrapper: Any, adapters: torch.Tensor) -> None:
    """Sets the adapters of the rows whose logits are computed next."""
    wrapper._sampler_indices[: len(adapters)] = adapters
    wrapper.indices_len[1] = len(adapters)
