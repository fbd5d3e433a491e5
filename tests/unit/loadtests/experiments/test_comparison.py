"""Comparisons of our points with the paper's, and of policies."""

import pytest

from loadtests.experiments import comparison
from tests.unit.loadtests.experiments.made_figures import point


def test_a_line_per_target_says_whether_it_was_reached() -> None:
    points = [point("Llumnix", 1, 1.2, 1.0), point("Llumnix", 2, 2.0, 1.0), point("Llumnix", 3, 1.1, 1.0)]
    points += [point("Llumnix", 1, 2.0, 1.0, "Decode P99"), point("Llumnix", 9, 2.0, None)]

    decode, prefill = comparison.against_targets(points)

    assert "median of ours / paper 2.00 over 1 points" in decode
    assert decode.endswith("MISSED")
    assert "median of ours / paper 1.20 over 3 points, from 1.10 to 2.00" in prefill
    assert prefill.endswith("reached")


def test_factors_between_policies_are_ours_and_the_papers() -> None:
    points = [point("INFaaS++", 1, 4.0, 2.0), point("INFaaS++", 2, 9.0, 8.0)]
    points += [point("Llumnix", 1, 2.0, 1.0), point("Llumnix", 2, 1.0, 2.0)]

    (line,) = comparison.factor_lines(points, ["Prefill P99"], "INFaaS++", "Llumnix")

    assert "ours at best 9.0 (L-L, 2), geometric mean 4.24" in line
    assert "paper's points at best 4.0 (L-L, 2), geometric mean 2.83" in line
    (line,) = comparison.reduction_line(points, "Prefill P99", "INFaaS++", "Llumnix")
    assert "ours 69%; paper's points 62%" in line


def test_sizes_at_equal_latency_are_interpolated() -> None:
    points = [point("INFaaS++", 10, 100.0, None), point("INFaaS++", 14, 1.0, None)]
    points += [point("Llumnix", 8, 10.0, None), point("Llumnix", 9, 1.0, None)]

    levels = comparison.at_equal_y(points, "Prefill P99", "L-L", "INFaaS++", "Llumnix", "ours")

    assert [tuple(map(pytest.approx, level)) for level in levels] == [(1, 14, 9), (10, 12, 8)]
    assert comparison.at_equal_y(points, "Prefill P99", "L-L", "INFaaS++", "Llumnix", "paper") == []
