"""A new request, as far as dispatch needs to know it."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

#: Prompts that begin with the same tokens are recognized in steps of this many tokens.
PREFIX_TOKENS = 128


class Demand(NamedTuple):
    """Requests that no instance has yet, and the tokens of their prompts."""

    requests: int = 0
    tokens: int = 0


NO_DEMAND = Demand()


class NewRequest(msgspec.Struct, frozen=True):
    """A request that no instance has yet.

    Attributes:
        prompt_tokens: Tokens to prefill.
        priority: As in vLLM: lower is earlier; see `router.priority` for its class.
        prefix_keys: One number per whole `PREFIX_TOKENS` of the prompt, a hash of all tokens up to there: two
            prompts with the same i-th key begin with the same (i + 1) * PREFIX_TOKENS tokens.
    """

    prompt_tokens: int
    priority: int = 0
    prefix_keys: tuple[int, ...] = ()


def prefix_keys(token_ids: Sequence[int]) -> tuple[int, ...]:
    """Computes `NewRequest.prefix_keys`. Equal in every process: Python hashes integers without a seed."""
    keys = []
    key = 0
    for end in range(PREFIX_TOKENS, len(token_ids) + 1, PREFIX_TOKENS):
        key = hash((key, *token_ids[end - PREFIX_TOKENS : end]))
        keys.append(key)
    return tuple(keys)
