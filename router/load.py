"""What the scheduler knows of an instance: one flat value of plain numbers."""

import msgspec
from msgspec.structs import replace

#: What an instance is used for. "neutral" instances prefill and decode.
ROLES = ("prefill", "decode", "neutral")


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
        expected_requests: Requests whose demand that is.
        moves_decided: Orders of the scheduler to move a request, answered since the start by a choice (of
            nothing, maybe); tells which orders a report has seen.
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
    expected_requests: int = 0
    moves_decided: int = 0

    @property
    def is_empty(self) -> bool:
        """Nothing runs, waits, comes or goes here."""
        return not (self.running or self.waiting or self.migrating_in or self.migrating_out)

    def after_taking(self, num_blocks: int, requests: int = 1) -> "InstanceLoad":
        """As it will be once it has taken requests of so many blocks."""
        return replace(
            self,
            expected_blocks=self.expected_blocks + num_blocks,
            expected_requests=self.expected_requests + requests,
        )

    def after_giving(self, num_blocks: int, requests: int = 1) -> "InstanceLoad":
        """As it will be once running requests of so many blocks have left it."""
        return replace(
            self,
            free_blocks=min(self.free_blocks + num_blocks, self.total_blocks),
            running=max(self.running - requests, 0),
        )
