"""Dispatch to wherever the first token comes soonest, by measured times."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from msgspec import Meta

from router.dispatch.dispatch_policy import can_start
from router.freeness import dispatch_freeness
from router.load import InstanceLoad
from router.request import NewRequest

#: Time for a prompt token while no instance has computed one, in seconds.
UNKNOWN_TOKEN_S = 1e-4


@dataclass
class Soonest:
    """The instance that will have computed the prompt first; among equals, the freest one.

    It has its backlog to compute, and what of the prompt it has neither cached nor can copy sooner.

    Decode instances take part if the policy set lets them (`decode_prompt_tokens`). Each of their steps takes
    that many tokens of a prompt at most, beside a token for each request of their batch.
    """

    uses_prefixes: ClassVar[bool] = True

    decode_patience: Annotated[
        float,
        Meta(gt=0, description="A decode instance has to be sooner by this factor than a prefill instance."),
    ] = 1.0

    def choose(
        self, loads: Sequence[InstanceLoad], request: NewRequest, rng: random.Random
    ) -> InstanceLoad | None:
        measured = [load.prompt_token_s for load in loads if load.prompt_token_s]
        mean_s = sum(measured) / len(measured) if measured else UNKNOWN_TOKEN_S

        def cost(load: InstanceLoad) -> float:
            seconds = first_token_s(load, request.prompt_tokens, load.prompt_token_s or mean_s)
            return seconds if can_start(load) else seconds * self.decode_patience

        def preference(load: InstanceLoad) -> tuple[float, str]:
            return -dispatch_freeness(load, request.priority), load.instance_id

        costs = [cost(load) for load in loads]
        least = min(costs, default=0.0)
        equals = [load for load, seconds in zip(loads, costs, strict=True) if seconds == least]
        return min(equals, key=preference, default=None)


def first_token_s(load: InstanceLoad, prompt_tokens: int, token_s: float) -> float:
    """Time until an instance has computed a prompt, and everything that is before it in its queue.

    Each step takes the time of one without prompts (the shortest one on an idle instance), and that of its
    prompt tokens.

    Args:
        load: With `cached_tokens`, `copied_tokens` and `copy_s` for this prompt.
        token_s: Time for each prompt token there.
    """
    tokens = load.waiting_tokens + max(prompt_tokens - load.cached_tokens - load.copied_tokens, 1)
    seconds = load.copy_s + tokens * token_s
    step_s = load.decode_step_s if load.running else load.least_step_s
    return seconds + -(-tokens // max(load.step_prompt_tokens, 1)) * step_s
