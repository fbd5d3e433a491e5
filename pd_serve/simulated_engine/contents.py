"""What KV blocks of a simulated engine hold, and the tokens that follow from it.

The KV of a token is a number made of the token and its position; a block holds the sum over its tokens, and
the next token is made of the sum over all blocks of the request. As in attention the order of the blocks
does not matter, since every entry knows its position, and every entry counts: a block that was lost, copied
too early or to the wrong place changes all tokens generated from then on.
"""

from collections.abc import Sequence
from typing import Protocol

MASK = (1 << 64) - 1

_TOKEN, _POSITION, _NEXT, _BLOCK = (
    0x9E37_79B9_7F4A_7C15,
    0xC2B2_AE3D_27D4_EB4F,
    0x1656_67B1_9E37_79F9,
    0xD6E8_FEB8_6659_FD93,
)

#: Bits of a sampled token that chance decides.
CHANCE = 0xF

#: Content of a block that was not written: a freed one, or the target of a copy that did not happen.
GARBAGE = 0xDEAD_DEAD_DEAD_DEAD


def kv_of(position: int, token: int) -> int:
    return (token + _TOKEN) * (position * _POSITION + 1) & MASK


def text_token(text: int, position: int) -> int:
    """The token at a position of a text that is known by its number."""
    return ((text + _TOKEN) * (position * _POSITION + 1) & MASK) >> 48


def token_after(digest: int, vocabulary: tuple[int, int]) -> int:
    """The token that the model generates after contents with this sum.

    Args:
        vocabulary: (first, number) of the tokens that it can generate.
    """
    first, count = vocabulary
    return first + ((digest * _NEXT & MASK) >> 48) % count


def sampled_token(token: int, epoch: int, index: int) -> int:
    """A token with some chance in it, which differs between the copies of a request.

    Args:
        token: See `token_after`.
        epoch: Epoch of the copy that samples.
        index: Index of the token in the output.
    """
    return token ^ (((epoch + 1) * _TOKEN + index * _POSITION & MASK) >> 48 & CHANCE)


class Prompt(Protocol):
    """The tokens of a prompt, as far as their KV is concerned."""

    @property
    def num_tokens(self) -> int: ...

    def content(self, block: int, num_tokens: int, block_tokens: int) -> int:
        """What block number `block` of the prompt holds once its first `num_tokens` tokens are computed."""


class OutputCheck:
    """Checks that each token of an output is one that follows from the prompt and all tokens before it.

    Args:
        sampled: See `EngineSettings.sampled`. The other bits of a token are checked.
    """

    def __init__(self, prompt: Prompt, block_tokens: int, *, sampled: bool) -> None:
        self.num_tokens = 0
        self._prompt_tokens = prompt.num_tokens
        self._digest = _digest(prompt, block_tokens)
        self._chance = CHANCE if sampled else 0

    def take(self, tokens: Sequence[int]) -> int | None:
        """Takes the next tokens. Returns the index in the output of the first wrong one."""
        wrong = None
        for token in tokens:
            expected = (self._digest * _NEXT & MASK) >> 48
            if (token ^ expected) & ~self._chance and wrong is None:
                wrong = self.num_tokens
            self._digest += kv_of(self._prompt_tokens + self.num_tokens, token)
            self.num_tokens += 1
        return wrong


class TokenPrompt:
    """A prompt of known tokens."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.num_tokens = len(token_ids)
        self._token_ids = token_ids

    def content(self, block: int, num_tokens: int, block_tokens: int) -> int:
        held = range(block * block_tokens, block * block_tokens + num_tokens)
        return sum(kv_of(position, self._token_ids[position]) for position in held) & MASK


class SegmentPrompt:
    """A prompt known by what each of its segments contains; see `TraceRequest.segments`.

    Args:
        seed: Stands for everything that `segments` does not name.
    """

    def __init__(self, num_tokens: int, segments: Sequence[int], segment_tokens: int, seed: int) -> None:
        self.num_tokens = num_tokens
        self._segments = segments
        self._segment_tokens = segment_tokens
        self._seed = seed

    def content(self, block: int, num_tokens: int, block_tokens: int) -> int:
        segment = block * block_tokens // self._segment_tokens
        named = segment < len(self._segments)
        source = self._segments[segment] * 2 if named else self._seed * 2 + 1
        mixed = (source + _TOKEN) * (block * _BLOCK + 1) + num_tokens
        return (mixed ^ mixed >> 29) * _NEXT & MASK


def expected_output(
    prompt: Prompt, num_output_tokens: int, block_tokens: int, vocabulary: tuple[int, int] = (0, 1 << 16)
) -> list[int]:
    """The output of a request, whatever migrations, preemptions and restarts it goes through."""
    digest = _digest(prompt, block_tokens)
    output: list[int] = []
    first, count = vocabulary
    for position in range(prompt.num_tokens, prompt.num_tokens + num_output_tokens):
        token = first + ((digest * _NEXT & MASK) >> 48) % count  # `token_after`
        digest = digest + (token + _TOKEN) * (position * _POSITION + 1) & MASK  # `kv_of`
        output.append(token)
    return output


def _digest(prompt: Prompt, block_tokens: int) -> int:
    """The sum over the contents of all blocks of a prompt."""
    digest = 0
    for block in range(-(-prompt.num_tokens // block_tokens)):
        num_tokens = min(block_tokens, prompt.num_tokens - block * block_tokens)
        digest += prompt.content(block, num_tokens, block_tokens)
    return digest
