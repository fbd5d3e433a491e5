"""Invariants of an engine with a migrating scheduler."""

from collections.abc import Collection
from typing import Any

from vllm.v1.engine.core import EngineCore

from migration.vllm_engine import worker


def check_engine(core: EngineCore, stays: set[str], under_way: Collection[str], migrates: bool) -> list[str]:
    """The violated invariants, in words.

    Args:
        stays: Ids of the requests that the adapter knows, arriving ones included.
        under_way: See `migration.engine_interface.Engine.check_integrity`.
        migrates: Whether the scheduler is a migrating one.
    """
    known = set(core.scheduler.requests)
    problems = []
    if migrates:
        problems += check_scheduler(core.scheduler, under_way)
        known |= {r.request_id for r in core.scheduler.migration.arriving.values()}
    if lost := stays - known:
        problems.append(f"bookkeeping for requests that are gone: {sorted(lost)}")
    if not known and not core.scheduler.has_requests():
        kept = max(core.collective_rpc(worker.num_requests))
        if kept:
            problems.append(f"the model runner keeps state of {kept} requests at rest")
    return problems


def check_scheduler(scheduler: Any, under_way: Collection[str] = ()) -> list[str]:
    """The violated invariants, in words: leaked blocks, tables that should be empty, lost batch slots."""
    problems = []
    state = scheduler.migration
    holders = set(scheduler.requests) | {r.request_id for r in state.arriving.values()}
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        leaked = {rid for rid, blocks in manager.req_to_blocks.items() if blocks} - holders
        if leaked:
            problems.append(f"blocks are held for unknown requests {sorted(leaked)}")
    pool = scheduler.kv_cache_manager.block_pool
    problems += scheduler.migrated_blocks.check_integrity(set(scheduler.requests), under_way)
    lent = scheduler.migrated_blocks.pinned or scheduler.migrated_blocks.prefixes.reserved
    if not (holders or scheduler.deferred_frees or lent):
        free, usable = pool.get_num_free_blocks(), pool.num_gpu_blocks - 1  # block 0 is the null block
        if free != usable:
            problems.append(f"at rest {usable - free} of {usable} blocks are not free")
    if not set(state.suspended) <= set(scheduler.requests):
        problems.append("a suspended request is unknown to the scheduler")
    if any(r in scheduler.running for r in state.suspended.values()):
        problems.append("a request is both suspended and running")
    if scheduler.max_num_active_reqs != scheduler.max_active - len(state.suspended) - len(state.arriving):
        problems.append("batch slots are not accounted for")
    if not set(state.arrived) <= set(scheduler.requests):
        problems.append(f"ended requests are remembered as arrivals: {sorted(state.arrived)}")
    if not scheduler.requests:
        for name, table in (("suspended", state.suspended), ("waiters", state.waiters)):
            if table:
                problems.append(f"{name} is not empty at rest: {sorted(table)}")
    return problems
