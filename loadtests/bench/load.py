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
        long_share: Share of the requests with lengths of their own.
        long_prompt, long_output: Ranges of these; None for that of the others.
    """

    prompt: TokenRange
    output: TokenRange
    long_prompt: TokenRange | None = None
    long_share: float = 0.0
    long_output: TokenRange | None = None

    @classmethod
    def equal(cls, prompt_tokens: int, output_tokens: int) -> "Lengths":
        """The same lengths for all requests."""
        return cls((prompt_tokens, prompt_tokens), (output_tokens, output_tokens))

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """(prompt tokens, output tokens) of one request."""
        prompt, output = self.prompt, self.output
        if self.long_share and rng.random() < self.long_share:
            prompt, output = self.long_prompt or prompt, self.long_output or output
        return rng.randint(*prompt), rng.randint(*output)


@dataclass(frozen=True, slots=True)
class Load:
    """The load of one round: an open loop if it has a rate, a closed loop of clients otherwise.

    Attributes:
        rate: Requests/s of Poisson arrivals.
        num_clients: Clients of a closed loop; each sends its next request when the previous one has ended.
        as_text: Prompts are sent as text instead of token ids, which some routers do not accept.
        as_chat: Each prompt, a text, is the message of a chat.
        turns: Requests of a session in a closed loop with texts: each prompt is the last one, its answer, and
            new text of the drawn length. One client has all turns of a session.
    """

    name: str
    num_requests: int
    lengths: Lengths
    rate: float | None = None
    num_clients: int = 0
    as_text: bool = False
    as_chat: bool = False
    turns: int = 1

    def requests(self, seed: int) -> list[TraceRequest]:
        """The requests; the same for the same seed. All arrive at 0 in a closed loop.

        The turns of a session follow each other; as many sessions as `num_requests` take.
        """
        rng = random.Random(f"{self.name} {seed}")
        count = -(-self.num_requests // self.turns) * self.turns
        times = np.zeros(count)
        if self.rate is not None:
            times = drawn(Arrivals("poisson"), self.rate, count, np.random.RandomState(seed))
        requests: list[TraceRequest] = []
        for number, at in enumerate(times):
            prompt, output = self.lengths.draw(rng)
            before = number - 1 if number % self.turns else None
            if before is not None:
                prompt += requests[before].prompt_tokens + requests[before].output_tokens
            requests.append(TraceRequest(float(at), prompt, output, turn_of=before))
        return requests

    def prompts(self, seed: int) -> Sequence[str | list[int]]:
        """Random prompts of lower-case letters, which are one token each for the demo model; the new text of
        later turns.
        """
        rng = random.Random(f"prompts {self.name} {seed}")
        requests = self.requests(seed)
        prompts = []
        for request in requests:
            known = 0
            if request.turn_of is not None:
                before = requests[request.turn_of]
                known = before.prompt_tokens + before.output_tokens
            new = request.prompt_tokens - known
            prompts.append([rng.randrange(ord("a"), ord("z") + 1) for _ in range(new)])
        return [bytes(prompt).decode() for prompt in prompts] if self.as_text or self.as_chat else prompts
