"""Choice and set-up of vLLM's executor, with two corrections for CPUs."""

from typing import Any

import numpy as np
import torch
from vllm.v1.executor import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class SteadySeedsExecutor(UniProcExecutor):
    """A prompt computed in chunks draws nothing from its request's generator until its last chunk.

    vLLM samples after every chunk, throws the token away and winds the generator back by its offset,
    which a CPU generator does not have: a seeded request with a chunked prompt would end the engine.
    Here the generator is out of the batch while such a token is sampled.

    Source: vllm/v1/worker/gpu_model_runner.py, _bookkeeping_sync (set_offset).
    """

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        runner: Any = self.driver_worker.worker.model_runner
        batch = runner.input_batch
        unfinished = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0].tolist()
        kept_out = {row: batch.generators.pop(row) for row in unfinished if row in batch.generators}
        try:
            return super().sample_tokens(grammar_output, non_block)
        finally:
            batch.generators.update(kept_out)


def compile_nothing_if_eager(config: Any) -> None:
    """Extends `--enforce-eager` on a CPU to the few helpers that vLLM compiles nevertheless.

    The first request with logprobs would wait seconds for the C++ compiler, and with it every other
    request of its instance. Source: vllm/v1/sample/ops/logprobs.py, batched_count_greater_than.
    """
    from vllm.platforms import current_platform

    if config.model_config.enforce_eager and current_platform.is_cpu():
        torch.compiler.set_stance("force_eager")


def executor_class(config: Any) -> type[Executor]:
    """vLLM's choice, or the one above where it is needed."""
    from vllm.platforms import current_platform

    chosen = Executor.get_class(config)
    return SteadySeedsExecutor if chosen is UniProcExecutor and current_platform.is_cpu() else chosen
