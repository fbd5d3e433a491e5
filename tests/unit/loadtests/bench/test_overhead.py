"""The summary of the overhead benchmark."""

from loadtests.bench.overhead import ApiServerUse, PairedRound, summary
from loadtests.bench.rounds import RoundMedians
from loadtests.servers import OURS


def _round(ours: tuple[float, float, float], stock: tuple[float, float, float]) -> PairedRound:
    """Of each server: tokens/s, TTFT in ms, and tokens per CPU second of its API server."""
    (our_rate, our_ttft, our_use), (rate, ttft, use) = ours, stock
    medians = RoundMedians(our_rate, our_ttft, 1.0, 1.0), RoundMedians(rate, ttft, 1.0, 1.0)
    return PairedRound(OURS, *medians, ApiServerUse(our_use, 1.0), ApiServerUse(use, 1.0))


def test_the_summary_is_the_median_over_pairs_not_the_ratio_of_medians() -> None:
    pairs = [
        _round((90, 12, 30), (100, 10, 20)),
        _round((200, 30, 50), (200, 29, 40)),
        _round((50, 10, 90), (40, 13, 30)),
    ]

    result = summary({"1": pairs, "8": pairs[:1]})

    assert result == {
        "throughput_ratio": {"1": 1.0, "8": 0.9},
        "ttft_added_ms": {"1": 1.0, "8": 2.0},
        "api_server_ratio": {"1": 1.5, "8": 1.5},
    }
