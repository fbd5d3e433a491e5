"""Outcomes of requests, made by hand."""

from collections.abc import Sequence

from loadtests.outcome import Outcome


def made_outcome(
    ttft_s: float = 0.0, gaps_s: Sequence[float] = (), tokens: int = 0, *, error: str | None = None
) -> Outcome:
    return Outcome(0, tokens, ttft_s, gaps_s, ttft_s + sum(gaps_s), error=error)
