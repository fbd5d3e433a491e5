"""Numbers of measured rounds."""

import pytest

from loadtests.bench.rounds import Round, RoundMedians, median_ratios, summarize_rounds
from pd_serve.errors import PdServeError
from tests.unit.loadtests.bench.made_outcomes import made_outcome


def test_numbers_are_those_of_the_requests_that_did_not_fail() -> None:
    good = made_outcome(0.1, (0.01, 0.03), 3)
    slow = made_outcome(0.3, (0.05,), 2)
    rounds = [Round(2.0, 0.5, 1.0, [good, slow]), Round(1.0, 0.5, 1.0, [good, made_outcome(error="503")])]

    numbers = summarize_rounds(rounds)

    assert (numbers["requests"], numbers["failures"]) == (4, 1)
    assert (numbers["ttft_p50_ms"], numbers["itl_p50_ms"], numbers["tpot_p50_ms"]) == (100.0, 30.0, 20.0)
    assert numbers["longest_gap_max_ms"] == 50.0
    assert numbers["output_tokens_per_s"] == pytest.approx((2.5 + 3) / 2, abs=0.1)
    assert numbers["cpu_ms_per_token"] == 125.0


def test_a_round_of_failures_has_no_times() -> None:
    numbers = summarize_rounds([Round(1.0, 0.1, 1.0, [made_outcome(error="503")])])

    assert numbers == {"requests": 1, "failures": 1, "output_tokens_per_s": 0.0}


def test_ratios_are_medians_over_pairs_of_rounds() -> None:
    def one(ttft_s: float) -> Round:
        return Round(1.0, 0.1, 1.0, [made_outcome(ttft_s, (0.01,), 2)])

    found = median_ratios([one(0.2), one(0.9), one(0.1)], [one(0.1), one(0.1), one(0.2)])

    assert found["ttft_p50_ms"] == 2.0
    assert found["output_tokens_per_s"] == 1.0


def test_there_is_no_ratio_to_zero() -> None:
    one, bunched = (Round(1.0, 0.1, 1.0, [made_outcome(0.1, (gap_s,), 2)]) for gap_s in (0.01, 0.0))

    assert "itl_p99_ms" not in median_ratios([one], [bunched])
    assert median_ratios([bunched], [one])["itl_p99_ms"] == 0.0


def test_medians_are_over_requests_and_over_all_gaps() -> None:
    one = Round(2.0, 0.5, 1.0, [made_outcome(0.1, (0.01, 0.03), 3), made_outcome(0.3, (0.02,), 2)])

    assert RoundMedians.of(one) == RoundMedians(2.5, 200.0, 20.0, 100.0)


def test_a_checked_round_with_a_failure_is_an_error() -> None:
    Round(1.0, 0.1, 1.0, [made_outcome(0.1, (0.01,), 2)]).check("vllm")

    with pytest.raises(PdServeError, match="a request to vllm failed: 503"):
        Round(1.0, 0.1, 1.0, [made_outcome(error="503")]).check("vllm")
