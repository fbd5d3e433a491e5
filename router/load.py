"""What the scheduler knows of an instance: one flat value of plain numbers."""

import msgspec


class InstanceLoad(msgspec.Struct, frozen=True):
    """Load of one instance at a step boundary, as its llumlet reports it.

    Attributes:
        instance_id: Who.
        role: "prefill", "decode" or "neutral". A scheduling fact: it may change while the instance runs.
        total_blocks, free_blocks: KV blocks that requests can use, and those free or evictable now.
            Blocks reserved for arriving migrations are not free.
        running: Batch size; requests suspended by a migration included.
        waiting: Requests queued for the batch.
        waiting_tokens: Prompt tokens still to be computed (prefill backlog).
        head_of_line_blocks: Blocks that the first queued request needs.
        migrating_in, migrating_out: Migrations in flight.
        draining: Takes nothing new; what it has is moved away.
        requests_added: New requests received since the start; tells which dispatches a report has seen.
        waiting_blocks: Blocks that all queued requests need, the first one's included.
        watermark_blocks: Blocks that the engine keeps free when it admits a request.
        preempted: Queued requests that had been running here and lost their blocks.
        high_priority: Requests of high priority in the batch.
        expected_blocks: Demand decided on and not in the report yet; added by whoever decided.
        block_tokens: Tokens per block.
    """

    instance_id: str
    role: str
    total_blocks: int = 0
    free_blocks: int = 0
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    head_of_line_blocks: int = 0
    migrating_in: int = 0
    migrating_out: int = 0
    draining: bool = False
    requests_added: int = 0
    waiting_blocks: int = 0
    watermark_blocks: int = 0
    preempted: int = 0
    high_priority: int = 0
    expected_blocks: int = 0
    block_tokens: int = 16

    @property
    def virtual_usage(self) -> int:
        """Blocks in use, plus the demand of the head of the line (queued behind it counts 0)."""
        return self.total_blocks - self.free_blocks + self.head_of_line_blocks


def freeness(load: InstanceLoad, extra_blocks: int = 0) -> float:
    """F = (M - sum of virtual usage) / B: roughly, decode steps left in blocks; higher is freer.

    An idle instance has no batch to divide by; it counts as a batch of one, which makes its freeness
    its whole capacity: the highest of its kind, and finite.

    Args:
        extra_blocks: Demand that is on its way and not in the report yet.

    Source: Llumnix (OSDI 2024), section 4.4.3; FACTS of this project, policies as evaluated.
    """
    return (load.total_blocks - load.virtual_usage - extra_blocks) / max(load.running, 1)
