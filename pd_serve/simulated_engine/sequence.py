"""One request in a simulated engine."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from migration.messages import RequestId
from migration.token_span import crc_of
from pd_serve.simulated_engine.contents import MASK, Prompt, kv_of
from router.priority import PriorityClass, priority_class


@dataclass(slots=True, eq=False)
class Sequence:
    """A request with its tokens and KV blocks.

    Attributes:
        rank: Arrival time of the request: within a priority, the latest is preempted first.
        payload: The request as the API server sent it.
        epoch: Ownership epoch.
        output: Tokens generated so far, on any instance; `emitted` of them have been sent to the client.
        crc: `crc_of` the tokens that have been sent.
        cached: Tokens that the prefix cache had when it was first admitted.
        computed: Tokens whose KV is in `blocks`. A decoding sequence has all but the last one.
        deferred: Tokens that steps have generated after `output`, and whose numbers and KV are not worked out
            yet; they count as computed. See `Batcher.work_out`.
        delivered: When its tokens that have not been sent reach its client, as far as steps have ended.
        digest: Sum over the contents of its blocks, as last read.
        hashes: One per full block, each over all contents up to there (prefix caching only).
        is_confirmed: Its blocks may enter the prefix cache: they were computed here, or the source has
            confirmed that they were whole when they were read.
        told: Client and epoch of the last token that was sent from here; None before the first one.
        added_at, begun_at: When this engine received it, and when the first step with a part of its prompt
            began.
        queue_key: Order in the queue of waiting requests.
    """

    request_id: RequestId
    prompt: Prompt
    max_tokens: int
    priority: int
    rank: float
    payload: list[bytes]
    client: str = ""
    epoch: int = 0
    output: list[int] = field(default_factory=list)
    emitted: int = 0
    crc: int = 0
    cached: int = 0
    computed: int = 0
    deferred: int = 0
    delivered: list[float] = field(default_factory=list)
    digest: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    is_confirmed: bool = True
    preemptions: int = 0
    preempted_at: float | None = None
    wants_handoff: bool = False
    told: tuple[str, int] | None = None
    added_at: float = 0.0
    begun_at: float | None = None
    prompt_tokens: int = field(init=False)
    is_high: bool = field(init=False)
    queue_key: tuple[int, int, float] = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = self.prompt.num_tokens
        self.is_high = priority_class(self.priority) is PriorityClass.HIGH
        self.queue_key = (self.priority, 1, self.rank)

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + len(self.output) + self.deferred

    @property
    def tokens_left(self) -> int:
        """Output tokens that it has still to generate."""
        return self.max_tokens - len(self.output) - self.deferred

    @property
    def is_decoding(self) -> bool:
        return bool(self.output) and self.computed == self.num_tokens - 1

    def continue_after(self, output_token_ids: Iterable[int]) -> None:
        """Its next token follows these, which have been sent."""
        self.output = list(output_token_ids)
        self.emitted, self.crc = len(self.output), crc_of(self.output)

    def times(self, now: float) -> tuple[float, float]:
        """Seconds that it waited here, and since then."""
        begun_at = self.added_at if self.begun_at is None else self.begun_at
        return begun_at - self.added_at, now - begun_at

    def content(self, block: int, num_tokens: int, block_tokens: int) -> int:
        """Content of block number `block` once its first `num_tokens` tokens are computed."""
        first = block * block_tokens
        of_prompt = min(num_tokens, max(0, self.prompt_tokens - first))
        value = self.prompt.content(block, of_prompt, block_tokens) if of_prompt else 0
        for position in range(first + of_prompt, first + num_tokens):
            value += kv_of(position, self.output[position - self.prompt_tokens])
        return value & MASK
