"""Samples of the cluster as series over time."""

import pytest

from loadtests.report import cluster_samples
from loadtests.report.cluster_samples import ClusterSample, InstancePeriod
from tests.unit.loadtests.report.made_report import SAMPLES


def test_periods_join_samples_with_the_same_state() -> None:
    assert cluster_samples.periods(SAMPLES) == [
        InstancePeriod("decode-0", "ready", 0.0, 2.0),
        InstancePeriod("decode-0", "draining", 2.0, 3.1),
        InstancePeriod("decode-1", "starting", 1.0, 3.1),
        InstancePeriod("decode-1", "ready", 3.1, 3.1),
    ]


def test_what_a_start_waits_for_is_no_state_of_its_own() -> None:
    states = ("to be started: in the place of decode-0", "waiting for resources: 1 GPU", "ready")
    samples = [
        ClusterSample(float(at_s), {"instances": [{"id": "decode-1", "state": state}]})
        for at_s, state in enumerate(states)
    ]

    assert cluster_samples.names(samples) == ["decode-1"]
    assert cluster_samples.periods(samples) == [
        InstancePeriod("decode-1", "starting", 0.0, 2.0),
        InstancePeriod("decode-1", "ready", 2.0, 2.0),
    ]


def test_series_follow_the_samples() -> None:
    assert cluster_samples.names(SAMPLES) == ["decode-0", "decode-1"]
    assert cluster_samples.used_share(SAMPLES, "decode-0") == ([0.0, 1.0, 2.0], [0.25, 0.5, 0.25])
    assert cluster_samples.used_share(SAMPLES, "decode-1") == ([3.1], [0.25])
    assert cluster_samples.totals(SAMPLES, "running") == [2, 4, 4, 2]
    assert cluster_samples.totals(SAMPLES, "waiting") == [5, 6, 6, 5]
    assert cluster_samples.migrations(SAMPLES, "committed") == {"handoff": [0, 3, 7, 8], "manual": [0] * 4}
    assert cluster_samples.line(SAMPLES[2]).endswith("decode-0 draining, decode-1 starting")


def test_a_decision_in_many_samples_is_listed_once() -> None:
    ((at_s, what),) = cluster_samples.decisions(SAMPLES)
    assert (at_s, what) == (pytest.approx(0.6, abs=0.1), "decode-1 is started: because")
