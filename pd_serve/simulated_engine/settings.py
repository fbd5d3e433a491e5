"""Settings of a simulated engine."""

from dataclasses import dataclass, replace

from pd_serve.simulated_engine.cost_model import CostModel

#: Granularity in tokens at which prompts name the contents that they share (as Mooncake's `hash_ids`).
SEGMENT_TOKENS = 512

#: KV blocks of the paper's instances. Arithmetic gives 851; with what the engine keeps for itself when
#: batches are large, this reproduces the paper's latencies best (docs/policies.md). Fitted once.
FITTED_BLOCKS = 780


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """One simulated engine. The sizes are the paper's; those of others are in `hardware`.

    Attributes:
        num_blocks: KV blocks.
        watermark: Share of them that admission leaves free.
        chunk_tokens: Token budget of a step with prompts mixed with decodes (chunked prefill); None for
            vLLM as in the paper: a step is prompts only or decodes only, prompts first.
        max_prefill_tokens: Prompt tokens per step without chunks.
        prompt_budget: Prompt tokens per step beside decodes, at most; steps are mixed then, whatever
            `chunk_tokens` says.
        vocabulary: (first, number) of the tokens that it generates.
        kv_bytes_per_token: For the time that migrations take.
        migration_slowdown: Share by which steps are slower that begin while KV is being copied; the mean of
            what the paper measured.
        async_scheduling: A step is decided while the previous one still runs, as vLLM does on GPUs.
        sampled: Chance decides some bits of each token, as with a temperature: two copies of a request
            generate different outputs. For the vocabulary of all 16-bit numbers.
    """

    cost_model: CostModel
    num_blocks: int = FITTED_BLOCKS
    block_tokens: int = 16
    max_num_seqs: int = 256
    watermark: float = 0.01
    chunk_tokens: int | None = None
    max_prefill_tokens: int = 6144
    prompt_budget: int | None = None
    prefix_caching: bool = False
    vocabulary: tuple[int, int] = (0, 1 << 16)
    kv_bytes_per_token: int = 512 * 1024
    migration_slowdown: float = 0.023
    async_scheduling: bool = False
    sampled: bool = False

    def of_role(self, role: str, decode_prompt_tokens: int) -> "EngineSettings":
        """The settings of an instance; a decode instance computes prompts within a budget, if at all.

        Args:
            decode_prompt_tokens: See `router.settings.PolicySet`.
        """
        if role != "decode" or not decode_prompt_tokens:
            return self
        return replace(self, prompt_budget=decode_prompt_tokens)

    @property
    def mixes(self) -> bool:
        """Whether a step may have prompts and decodes."""
        return self.chunk_tokens is not None or self.prompt_budget is not None

    @property
    def step_prompt_tokens(self) -> int:
        """Prompt tokens that a step takes at most."""
        return self.prompt_budget or self.chunk_tokens or self.max_prefill_tokens
