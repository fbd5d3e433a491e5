"""Prompts of given lengths in tokens, with shared beginnings where the trace has them."""

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache

from loadtests.workload import PlannedRequest
from pd_serve.simulated_engine.settings import SEGMENT_TOKENS

#: Prompts are made of its tokens, which are ordinary in any tokenizer.
SAMPLE_TEXT = " the quick brown fox jumps over the lazy dog while seven bright wizards mix exact potions"


class PromptMaker:
    """Draws prompts from a few tokens; a request has the same prompt in every process.

    Args:
        token_ids: Tokens to draw from.
        pieces: The text of each token.
        chat_overhead: Number of tokens that the chat template adds to a message.
    """

    def __init__(
        self, token_ids: Sequence[int], pieces: Sequence[str], chat_overhead: int, seed: int
    ) -> None:
        self._token_ids = token_ids
        self._pieces = pieces
        self._chat_overhead = chat_overhead
        self._seed = seed
        self._segment = lru_cache(maxsize=512)(self._draw)

    def token_ids(self, request: PlannedRequest) -> list[int]:
        """A prompt of exactly the planned length."""
        return [self._token_ids[number] for number in self._drawn(request, request.prompt_tokens)]

    def message(self, request: PlannedRequest) -> str:
        """A chat message of at least one token. The whole prompt has the planned length if the tokenizer
        turns the text back into the same tokens, and nearly so otherwise."""
        tokens = max(1, request.prompt_tokens - self._chat_overhead)
        return "".join(self._pieces[number] for number in self._drawn(request, tokens))

    def _drawn(self, request: PlannedRequest, num_tokens: int) -> Iterator[int]:
        missing = num_tokens
        for segment in request.segments:
            if missing <= 0:
                return
            yield from self._segment(f"segment {segment}", SEGMENT_TOKENS)[:missing]
            missing -= SEGMENT_TOKENS
        if missing > 0:
            yield from self._draw(f"request {request.number}", missing)

    def _draw(self, name: str, num_tokens: int) -> list[int]:
        dice = random.Random(f"{self._seed} {name}")
        return dice.choices(range(len(self._token_ids)), k=num_tokens)
