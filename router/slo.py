"""Service level objectives: when a request meets its own, and where its deadline puts it in the queue."""

import math
from dataclasses import dataclass

#: The deadline of a request without a target for its first token, in seconds after its arrival. A request
#: with a target goes before those that arrived up to this long before it, and before no others.
UNTARGETED_TTFT_S = 10.0


@dataclass(frozen=True, slots=True)
class Slo:
    """Service level objective: bounds on the time to first token and on the mean time of later tokens.

    Attributes:
        ttft_s, tpot_s: In seconds; infinite for no bound.
    """

    ttft_s: float = 5.0
    tpot_s: float = 0.1

    @property
    def has_bounds(self) -> bool:
        return min(self.ttft_s, self.tpot_s) < math.inf

    @property
    def lead_s(self) -> float:
        """Seconds by which a request counts as arrived earlier: earliest deadline first within a priority.

        A target later than `UNTARGETED_TTFT_S` delays no request.
        """
        return max(UNTARGETED_TTFT_S - self.ttft_s, 0.0)

    def is_met(self, ttft_s: float, tpot_s: float) -> bool:
        return ttft_s <= self.ttft_s and tpot_s <= self.tpot_s


#: Of a request without targets.
NO_SLO = Slo(math.inf, math.inf)
