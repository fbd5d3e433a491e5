"""A new request, as far as dispatch needs to know it."""

from typing import NamedTuple

import msgspec


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
        prefix_keys: The keys of the prompt's full KV blocks; see `migration.cached_keys`. Empty if no policy
            needs them.
    """

    prompt_tokens: int
    priority: int = 0
    prefix_keys: tuple[int, ...] = ()
