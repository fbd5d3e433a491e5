"""What has to be done around vLLM's executor, by a subclass of it."""

from typing import Any

import numpy as np
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


def executor_class(config: Any) -> type[Executor]:
    """vLLM's choice, or the one above where it is needed."""
    from vllm.platforms import current_platform

    chosen = Executor.get_class(config)
    return SteadySeedsExecutor if chosen is UniProcExecutor and current_platform.is_cpu() else chosen
