"""An engine's load, read from its scheduler between two steps."""

from collections import Counter
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from migration.engine_interface import HeldBlocks, RunningRequest
from migration.messages import RequestId
from migration.step_times import StepTimes
from migration.vllm_engine.cache_groups import groups_of
from migration.vllm_engine.live_requests import LiveRequests
from router.load import EngineLoad
from router.priority import PriorityClass, priority_class


def read_load(scheduler: Any) -> EngineLoad:
    """Args: `scheduler` is one of vLLM's, with or without migration."""
    pool = scheduler.kv_cache_manager.block_pool
    holding, waiting = map(_members, (scheduler.kv_holding_waiting, scheduler.waiting))
    queued = [*holding, *waiting]
    lengths = [request.num_tokens for request in queued]
    backlog = sum(lengths) - sum([request.num_computed_tokens for request in queued])
    backlog += sum(r.num_tokens - r.num_computed_tokens for r in scheduler.running if r.is_prefill_chunk)
    migration = getattr(scheduler, "migration", None)
    arriving = migration.arriving.values() if migration else ()
    suspended = len(migration.suspended) if migration else 0
    groups = groups_of(scheduler)
    times = getattr(scheduler, "step_times", None) or StepTimes()
    held = [groups.num_blocks(request.request_id) for request in holding]
    return EngineLoad(
        total_blocks=pool.num_gpu_blocks - 1,  # block 0 is the null block
        free_blocks=pool.get_num_free_blocks(),
        reserved_blocks=sum(groups.num_blocks(r.request_id) for r in arriving),
        running=len(scheduler.running) + suspended,
        suspended=suspended,
        waiting=len(queued),
        waiting_tokens=backlog,
        head_of_line_blocks=max(0, groups.num_blocks_for(lengths[:1]) - sum(held[:1])),
        waiting_blocks=max(0, groups.num_blocks_for(lengths) - sum(held)),
        watermark_blocks=scheduler.kv_cache_manager.watermark_blocks,
        preempted=sum([request.num_preemptions > 0 for request in queued]),
        high_priority=_num_high_priority(scheduler.running),
        step_prompt_tokens=_step_prompt_tokens(scheduler),
        decode_step_s=times.decode_s,
        prompt_token_s=times.prompt_token_s,
        token_s=times.token_s,
        least_step_s=times.least_step_s,
        busy_s=times.busy_s,
        **groups.sizes,
    )


def _num_high_priority(requests: Any) -> int:
    """Requests of high priority. Asks once for each priority: a call for each request takes 0.1 ms."""
    counts = Counter(map(attrgetter("priority"), requests)).items()
    return sum(number for priority, number in counts if priority_class(priority) is PriorityClass.HIGH)


def _step_prompt_tokens(scheduler: Any) -> int:
    """Tokens of one prompt that a step takes at most."""
    config = scheduler.scheduler_config
    most = config.max_num_batched_tokens
    return int(min(most, config.long_prefill_token_threshold or most))


def _members(queue: Any) -> Any:
    """The requests of one of vLLM's queues, the next one first, the others in any order.

    Iterating over a priority queue would sort it, which takes four times as long as all that is read here.
    """
    return getattr(queue, "_heap", queue)


def read_held_blocks(scheduler: Any, name_of: Callable[[str], RequestId]) -> list[HeldBlocks]:
    """Blocks of each request; `scheduler` is one of vLLM's, `name_of` returns the request's own id."""
    migration = getattr(scheduler, "migration", None)
    arriving = [request.request_id for request in migration.arriving.values()] if migration else []
    groups = groups_of(scheduler)
    held = [(stay_id, False) for stay_id in scheduler.requests]
    held += [(stay_id, True) for stay_id in arriving]
    counted = [HeldBlocks(name_of(stay_id), groups.num_blocks(stay_id), comes) for stay_id, comes in held]
    return [entry for entry in counted if entry.blocks]


def read_running(scheduler: Any, requests: LiveRequests) -> list[RunningRequest]:
    """The requests that decode and can move; `scheduler` is one with migration."""
    decoding = [
        (requests[request.request_id], request, float(rank))
        for rank, request in enumerate(scheduler.running)
        if request.num_output_tokens and not request.is_prefill_chunk
    ]
    return [
        RunningRequest(live.request_id, request.priority, request.num_tokens, rank)
        for live, request, rank in decoding
        if live.unmovable is None
    ]
