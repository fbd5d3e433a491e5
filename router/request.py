"""A new request, as far as dispatch needs to know it."""

from typing import NamedTuple

import msgspec

from router.slo import NO_SLO, Slo


class Demand(NamedTuple):
    """Requests that a pool does not have yet.

    Attributes:
        tokens: Prompt tokens of those that no instance has.
        blocks: KV blocks of those that instances of another pool are to hand off.
    """

    requests: int = 0
    tokens: int = 0
    blocks: int = 0


NO_DEMAND = Demand()


class NewRequest(msgspec.Struct, frozen=True):
    """A request that no instance has yet.

    Attributes:
        prompt_tokens: Tokens to prefill.
        priority: As in vLLM: lower is earlier; see `router.priority` for its class.
        prefix_keys: The keys of the prompt's full KV blocks; see `migration.cached_keys`. Empty if no policy
            needs them.
        slo: Its targets.
        account: Number of its API key, for fair shares.
        session: What its client says that it is a turn of; "" for nothing.
        arrives_later_s: Seconds that it counts as arrived later in the order of its priority; below 0,
            earlier.
    """

    prompt_tokens: int
    priority: int = 0
    prefix_keys: tuple[int, ...] = ()
    slo: Slo = NO_SLO
    arrives_later_s: float = 0.0
    account: int = 0
    session: str = ""
