"""The load of a simulated engine, read between two steps."""

from pd_serve.simulated_engine.batcher import Batcher
from pd_serve.simulated_engine.migrations import SequenceMigrations
from router.load import EngineLoad


def read_load(batcher: Batcher, migrations: SequenceMigrations, taken: int = 0) -> EngineLoad:
    """Reads the load as `migration.vllm_engine.engine_load.read_load` does for vLLM.

    Args:
        taken: KV blocks that are in use, although the pool does not show it yet.
    """
    settings = batcher.settings
    prefilling = 0
    if settings.mixes:
        prefilling = sum(s.num_tokens - s.computed for s in batcher.running if not s.is_decoding)
    times = batcher.step_times
    # In the order of the fields, which takes a third of the time.
    return EngineLoad(
        total_blocks=settings.num_blocks,
        free_blocks=batcher.pool.num_free - taken,
        reserved_blocks=sum([len(s.blocks) for s in migrations.arriving.values()]),
        waiting_blocks=batcher.waiting_blocks,
        head_of_line_blocks=batcher.num_blocks(batcher.waiting[0].num_tokens) if batcher.waiting else 0,
        watermark_blocks=batcher.watermark_blocks,
        block_tokens=settings.block_tokens,
        step_prompt_tokens=settings.step_prompt_tokens,
        running=len(batcher.running) + len(migrations.suspended),
        suspended=len(migrations.suspended),
        high_priority=sum([s.is_high for s in batcher.running]),
        waiting=len(batcher.waiting),
        waiting_tokens=batcher.waiting_tokens + prefilling,
        preempted=batcher.num_preempted,
        decode_step_s=times.decode_s,
        prompt_token_s=times.prompt_token_s,
        token_s=times.token_s,
        least_step_s=times.least_step_s,
        busy_s=times.busy_s,
    )
