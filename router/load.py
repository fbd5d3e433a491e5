"""What the scheduler knows of an instance: one flat record of plain numbers."""

from operator import attrgetter
from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import replace

#: What an instance is used for. "neutral" instances prefill and decode.
ROLES = ("prefill", "decode", "neutral")


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Load of one engine, read between two steps: the engine's part of an `InstanceLoad`.

    The description of each field is its meaning in metrics, too.

    Attributes:
        step_prompt_tokens: Prompt tokens that a step takes at most.
        full_groups: Cache groups in which a request has blocks for all its tokens.
        window_groups: Cache groups in which it has blocks for the tokens of a window.
        window_blocks: The most blocks that a request has in these.
        least_step_s: Duration of the shortest steps without prompts.
        busy_s: Duration of all steps since the start.
        state_blocks: Blocks that a request has whatever its length (states of linear attention).
    """

    total_blocks: Annotated[int, Meta(description="KV blocks that requests can use.")] = 0
    free_blocks: Annotated[int, Meta(description="KV blocks free or evictable now.")] = 0
    reserved_blocks: Annotated[int, Meta(description="KV blocks held for arriving requests; not free.")] = 0
    waiting_blocks: Annotated[int, Meta(description="KV blocks that all queued requests need.")] = 0
    head_of_line_blocks: Annotated[
        int, Meta(description="KV blocks that the first queued request needs.")
    ] = 0
    watermark_blocks: Annotated[
        int, Meta(description="KV blocks that the engine keeps free when it admits a request.")
    ] = 0
    block_tokens: Annotated[int, Meta(description="Tokens per KV block.")] = 16
    step_prompt_tokens: int = 0
    full_groups: int = 1
    window_groups: int = 0
    window_blocks: int = 0
    state_blocks: int = 0
    running: Annotated[int, Meta(description="Requests in the batch, suspended ones included.")] = 0
    suspended: Annotated[
        int,
        Meta(description="Requests out of the batch while their last blocks are copied to another instance."),
    ] = 0
    high_priority: Annotated[int, Meta(description="Requests of high priority in the batch.")] = 0
    waiting: Annotated[int, Meta(description="Requests queued for the batch.")] = 0
    waiting_tokens: Annotated[int, Meta(description="Prompt tokens still to be computed.")] = 0
    preempted: Annotated[int, Meta(description="Queued requests that have lost their blocks.")] = 0
    decode_step_s: Annotated[
        float,
        Meta(title="decode_step_seconds", description="Mean duration of the latest steps without prompts."),
    ] = 0.0
    prompt_token_s: Annotated[
        float,
        Meta(
            title="prompt_token_seconds",
            description="Time that each prompt token has added to the latest steps; 0 until there was one.",
        ),
    ] = 0.0
    token_s: Annotated[
        float,
        Meta(
            title="token_seconds",
            description="Time for each token of a running request, steps with prompts included.",
        ),
    ] = 0.0
    least_step_s: float = 0.0
    busy_s: float = 0.0


#: The fields of an engine's load that decisions follow. The others change with every token.
decisive = attrgetter("total_blocks", "running", "suspended", "waiting", "waiting_tokens", "reserved_blocks")


class InstanceLoad(EngineLoad, frozen=True):
    """Load of one instance as its llumlet reports it: its engine's load, and what the llumlet adds.

    Attributes:
        role: One of `ROLES`. It may change while the instance runs.
        drained_by_operator: It drains for an operator, who alone can end that.
        requests_added: Requests received since the start; tells which dispatches a report has seen.
        moves_decided: Orders of the scheduler to move a request that were carried out since the start (an
            order may choose no request); tells which orders a report has seen.
        slow_blocks: Free blocks whose use would take the time per token over the target; see `slow_blocks`.
        expected_blocks, expected_requests: Demand that was decided on and is not in the report yet. Added by
            the process that decided.
        cached_tokens: Tokens at the beginning of the request in question whose KV blocks it has, for policies
            that use prefixes. Added by the process that decides.
        copied_tokens: Tokens whose KV blocks it would copy from another instance. Added as well.
        copy_s: Time that this copy takes; of a request that is handed off, how much longer a copy of its
            blocks takes than to the instances on its machine. Added as well.
    """

    instance_id: str
    role: str
    migrating_in: Annotated[int, Meta(description="Migrations arriving.")] = 0
    migrating_out: Annotated[int, Meta(description="Migrations leaving.")] = 0
    draining: Annotated[bool, Meta(description="1 while it takes nothing new.")] = False
    drained_by_operator: bool = False
    requests_added: int = 0
    moves_decided: int = 0
    step_s: Annotated[
        float, Meta(title="step_in_progress_seconds", description="Time that the step in progress has taken.")
    ] = 0.0
    hangs: Annotated[bool, Meta(description="1 if its step has exceeded its bound.")] = False
    block_copy_s: Annotated[
        float,
        Meta(
            title="block_copy_seconds",
            description="Time for each KV block in the latest copies to the instance on its machine; 0 until"
            " there was one.",
        ),
    ] = 0.0
    far_block_copy_s: Annotated[
        float,
        Meta(
            title="far_block_copy_seconds",
            description="Time for each KV block in the latest copies from other machines; 0 until there was"
            " one.",
        ),
    ] = 0.0
    busy: Annotated[
        float, Meta(title="busy_ratio", description="Share of the last seconds that the engine was in steps.")
    ] = 0.0
    slow_blocks: int = 0
    expected_blocks: int = 0
    expected_requests: int = 0
    cached_tokens: int = 0
    copied_tokens: int = 0
    copy_s: float = 0.0

    @property
    def is_empty(self) -> bool:
        """No request runs or waits, and no migration is under way."""
        return not (self.running or self.waiting or self.migrating_in or self.migrating_out)

    @property
    def demanded_blocks(self) -> int:
        """Blocks in use, and those that its queue and the demand that is not in its report need."""
        return self.total_blocks - self.free_blocks + self.waiting_blocks + self.expected_blocks

    @property
    def mean_blocks(self) -> int:
        """Blocks that a running request holds on average, rounded up."""
        return -(-(self.total_blocks - self.free_blocks) // max(self.running, 1))

    def copy_time_s(self, num_blocks: int, *, is_far: bool) -> float:
        """Time to copy blocks to it, in seconds; 0 as long as it has copied nothing over this distance."""
        return num_blocks * (self.far_block_copy_s if is_far else self.block_copy_s)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that this many tokens of a request take here."""
        blocks = -(-num_tokens // self.block_tokens)
        return (
            blocks * self.full_groups
            + min(blocks * self.window_groups, self.window_blocks)
            + self.state_blocks
        )

    def with_arrivals(self, num_blocks: int, requests: int = 1) -> "InstanceLoad":
        """The load after requests that need `num_blocks` blocks together have arrived."""
        return replace(
            self,
            expected_blocks=self.expected_blocks + num_blocks,
            expected_requests=self.expected_requests + requests,
        )

    def with_departures(self, num_blocks: int, requests: int = 1) -> "InstanceLoad":
        """The load after running requests that hold `num_blocks` blocks together have left."""
        return replace(
            self,
            free_blocks=min(self.free_blocks + num_blocks, self.total_blocks),
            running=max(self.running - requests, 0),
        )


def slow_blocks(load: EngineLoad, target_s: float) -> int:
    """Blocks that memory has, but not the time per token under the target.

    The blocks in use take the time per token from that of the shortest steps to the present one, prompts
    between decodes included. By the same ratio the target is reached at a number of blocks: what there is
    beyond is not free. No target, or one that even the shortest steps miss, gives 0.

    Args:
        target_s: Time per token in seconds; 0 for none.
    """
    used = load.total_blocks - load.free_blocks
    over = load.token_s - load.least_step_s
    if not used or not load.running or over <= 0 or target_s <= load.least_step_s:
        return 0
    usable = round(used * (target_s - load.least_step_s) / over)
    return max(load.total_blocks - usable, 0)
