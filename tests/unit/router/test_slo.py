"""Targets: what they bound, and how far ahead they bring a request."""

import math

import pytest

from router.slo import NO_SLO, UNTARGETED_TTFT_S, Slo


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "is_met"),
    [(1.0, 0.05, True), (1.01, 0.05, False), (1.0, 0.051, False), (0, 0, True)],
)
def test_both_bounds_have_to_be_kept(ttft_s: float, tpot_s: float, is_met: bool) -> None:
    assert Slo(1.0, 0.05).is_met(ttft_s, tpot_s) is is_met


def test_a_request_without_targets_meets_them_all() -> None:
    assert NO_SLO.is_met(1e9, 1e9)
    assert not NO_SLO.has_bounds
    assert Slo(math.inf, 0.1).has_bounds
    assert Slo(1.0, math.inf).has_bounds


def test_an_earlier_deadline_leads_by_the_difference() -> None:
    assert Slo(1.0).lead_s - Slo(3.0).lead_s == pytest.approx(2.0)
    assert Slo(1e-9).lead_s == pytest.approx(UNTARGETED_TTFT_S)


@pytest.mark.parametrize("ttft_s", [UNTARGETED_TTFT_S, 600.0, math.inf])
def test_a_late_target_delays_no_request(ttft_s: float) -> None:
    assert Slo(ttft_s).lead_s == NO_SLO.lead_s == 0.0
