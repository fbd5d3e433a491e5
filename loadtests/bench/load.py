"""The load of one benchmark round: which requests, and when or by how many clients."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pd_serve.simulation.arrivals import Arrivals, drawn
from pd_serve.simulation.config import TraceRequest

#: Least and greatest number of tokens.
TokenRange = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Uniformly distributed lengths.

    Attributes:
        long_prompt: Range for a share of `long_share` of the prompts; None for no long prompts.
    """

    prompt: TokenRange
    output: TokenRange
    long_prompt: TokenRange | None = None
    long_share: float = 0.0

    @classmethod
    def equal(cls, prompt_tokens: int, output_tokens: int) -> "Lengths":
        """The same lengths for all requests."""
        return cls((prompt_tokens, prompt_tokens), (output_tokens, output_tokens))

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """(prompt tokens, output tokens) of one request."""
        is_long = self.long_prompt is not None and rng.random() < self.long_share
        prompt = self.long_prompt if is_long and self.long_prompt is not None else self.prompt
        return rng.randint(*prompt), rng.randint(*self.output)


@dataclass(frozen=True, slots=True)
class Load:
    """The load of one round: an open loop if it has a rate, a closed loop of clients otherwise.

    Attributes:
        rate: Requests/s of Poisson arrivals.
        num_clients: Clients of a closed loop; each sends its next request when the previous one has ended.
        as_text: Prompts are sent as text instead of token ids, which some routers do not accept.
        as_chat: Each prompt, a text, is the message of a chat.
    """

    name: str
    num_requests: int
    lengths: Lengths
    rate: float | None = None
    num_clients: int = 0
    as_text: bool = False
    as_chat: bool = False

    def requests(self, seed: int) -> list[TraceRequest]:
        """The requests; the same for the same seed. All arrive at 0 in a closed loop."""
        rng = random.Random(f"{self.name} {seed}")
        times = np.zeros(self.num_requests)
        if self.rate is not None:
            times = drawn(Arrivals("poisson"), self.rate, self.num_requests, np.random.RandomState(seed))
        return [TraceRequest(float(at), *self.lengths.draw(rng)) for at in times]

    def prompts(self, seed: int) -> Sequence[str | list[int]]:
        """Random prompts of lower-case letters, which are one token each for the demo model."""
        rng = random.Random(f"prompts {self.name} {seed}")
        prompts = [
            [rng.randrange(ord("a"), ord("z") + 1) for _ in range(request.prompt_tokens)]
            for request in self.requests(seed)
        ]
        return [bytes(prompt).decode() for prompt in prompts] if self.as_text or self.as_chat else prompts
