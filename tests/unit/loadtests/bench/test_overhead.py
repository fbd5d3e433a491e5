"""The summary of the overhead benchmark."""

from loadtests.bench.overhead import PairedRound, summary
from loadtests.bench.rounds import RoundMedians
from loadtests.servers import OURS


def _round(ours: tuple[float, float], stock: tuple[float, float]) -> PairedRound:
    return PairedRound(OURS, RoundMedians(*ours, 1.0, 1.0), RoundMedians(*stock, 1.0, 1.0))


def test_the_summary_is_the_median_over_pairs_not_the_ratio_of_medians() -> None:
    pairs = [_round((90, 12), (100, 10)), _round((200, 30), (200, 29)), _round((50, 10), (40, 13))]

    result = summary({"1": pairs, "8": pairs[:1]})

    assert result == {"throughput_ratio": {"1": 1.0, "8": 0.9}, "ttft_added_ms": {"1": 1.0, "8": 2.0}}
