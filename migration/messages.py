"""The messages of a migration between two llumlets. One-way; msgpack on the wire, never pickle."""

from typing import NewType

import msgspec

from migration.errors import Refusal

RequestId = NewType("RequestId", str)
MigrationId = NewType("MigrationId", str)
InstanceId = NewType("InstanceId", str)


def stem_of(request_id: str) -> str:
    """What the ids of two requests share if one is the other one, sent again: all but the random end.

    Returns: "" for a request that cannot be found again; its id ends in a dot and the random end.
    """
    stem = request_id.rpartition("-")[0]
    return "" if stem.endswith(".") else stem


class RequestDescription(msgspec.Struct, frozen=True):
    """Everything a destination needs before it can reserve for a request.

    Attributes:
        request_id: The engine's (internal) request id.
        payload: The request as its engine encodes it: prompt, sampling parameters, priority, arrival
            time, cache salt. Opaque here; frames of vLLM's own msgpack encoding.
        client: Endpoint of the API server that takes the tokens.
        epoch: Ownership epoch at the source.
        incarnation: Number of preemptions; a change means that the blocks are not the same any more.
        output_token_ids: Tokens generated so far (empty while the prompt is being prefilled).
        num_prompt_tokens: Length of the prompt.
        max_total_tokens: Prompt plus the most that may be generated.
        compatibility: What has to be equal at the destination, by name.
    """

    request_id: RequestId
    payload: list[bytes]
    client: str
    epoch: int
    incarnation: int
    output_token_ids: list[int]
    num_prompt_tokens: int
    max_total_tokens: int
    compatibility: dict[str, str]

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.output_token_ids)


#: In the place of a block id: there is nothing to copy, such as behind a sliding window.
NO_BLOCK = -1


class BlockRun(msgspec.Struct, frozen=True):
    """Blocks of the source, of one cache group, that hold a request's tokens from block index `first` on."""

    first: int
    block_ids: list[int]

    @property
    def end(self) -> int:
        return self.first + len(self.block_ids)


class KvPart(msgspec.Struct, frozen=True):
    """A part of a request's KV cache to be copied, as blocks of its source.

    An engine keeps the layers of a model in cache groups, each with a block table of its own for every
    request. Blocks of most groups are never written again once they are full. A group of linear-attention
    layers has one block for each request, which every step overwrites: its **state**.

    Attributes:
        end: With this part the destination has the KV of all tokens before this one.
        runs: A run for each cache group, in the engine's order; empty for groups with state.
        states: The block of each group with state, in the same order. Only in a tail.
    """

    end: int
    runs: list[BlockRun]
    states: list[int] = []

    @property
    def block_ids(self) -> list[int]:
        """All blocks to be read."""
        held = [block for run in self.runs for block in run.block_ids if block != NO_BLOCK]
        return held + self.states


class CopyStage(msgspec.Struct, frozen=True):
    """One round of copying, as its source saw it.

    Attributes:
        begin_s, end_s: Since the migration began. The last one of a committed migration is the tail: the
            request is suspended from its begin on.
        blocks: What was offered to be copied, of all cache groups.
    """

    begin_s: float
    end_s: float
    blocks: int


class FinalState(msgspec.Struct, frozen=True):
    """A suspended, drained request: what is left to copy and what the destination continues from.

    Attributes:
        tail: What has not been copied yet: blocks, the last ones perhaps partly filled, and states.
        epoch: Ownership epoch at the source; the destination continues with `epoch + 1`.
        output_token_ids: All tokens generated so far.
        num_computed_tokens: Tokens whose KV is in the blocks: all but the last sampled one.
        rng_state: State of the request's own random generator, if it has one.
    """

    tail: KvPart
    epoch: int
    output_token_ids: list[int]
    num_computed_tokens: int
    rng_state: bytes | None = None


class MigrationMessage(msgspec.Struct, frozen=True, tag=True):
    migration_id: MigrationId


class Offer(MigrationMessage, frozen=True, tag=True):
    """Source → destination: reserve for this request, then pull."""

    reason: str
    request: RequestDescription
    kv_endpoint: bytes


class Refused(MigrationMessage, frozen=True, tag=True):
    """Destination → source: cannot take it, nothing is held."""

    refusal: Refusal


class Pull(MigrationMessage, frozen=True, tag=True):
    """Destination → source: the KV of tokens [0, tokens_done) is here, what next?"""

    tokens_done: int


class Stage(MigrationMessage, frozen=True, tag=True):
    """Source → destination: these full blocks are safe to read while the request decodes on."""

    part: KvPart


class Final(MigrationMessage, frozen=True, tag=True):
    """Source → destination: the request is suspended; copy the tail and commit."""

    state: FinalState


class KeepAlive(MigrationMessage, frozen=True, tag=True):
    """Source → destination: still prefilling, keep the reservation."""


class Withdraw(MigrationMessage, frozen=True, tag=True):
    """Source → destination: drop the migration; end the request there if it has been committed."""

    refusal: Refusal


class Confirmed(MigrationMessage, frozen=True, tag=True):
    """Source → destination: all blocks were whole when they were read, so that others may share them."""


class Query(MigrationMessage, frozen=True, tag=True):
    """Source → destination: has it been committed?"""


class Committed(MigrationMessage, frozen=True, tag=True):
    """Destination → source: the request has entered the batch here. Repeated on demand.

    Attributes:
        bytes_copied: What was read from the source's memory for it.
    """

    bytes_copied: int = 0


class Dropped(MigrationMessage, frozen=True, tag=True):
    """Destination → source: nothing of this migration is held here."""

    refusal: Refusal


ToDestination = Offer | Stage | Final | KeepAlive | Withdraw | Confirmed | Query
ToSource = Refused | Pull | Committed | Dropped
AnyMigrationMessage = ToDestination | ToSource
