"""Equal values counted at once come out as if one by one."""

from prometheus_client import CollectorRegistry, Histogram

from pd_serve.observe.histogram import BatchHistogram

BUCKETS = (0.1, 0.5, 2.0)


def test_its_samples_equal_those_of_the_librarys_histogram() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    batch = BatchHistogram("gaps_seconds", "Gaps.", BUCKETS, ours)
    single = Histogram("gaps_seconds", "Gaps.", buckets=BUCKETS, registry=theirs)

    for value, count in [(0.1, 3), (0.05, 1), (0.7, 2), (99.0, 4)]:
        batch.observe(value, count)
        for _ in range(count):
            single.observe(value)

    for name, labels in [
        *[("gaps_seconds_bucket", {"le": bound}) for bound in ("0.1", "0.5", "2.0", "+Inf")],
        ("gaps_seconds_count", {}),
    ]:
        assert ours.get_sample_value(name, labels) == theirs.get_sample_value(name, labels) is not None
    sums = [registry.get_sample_value("gaps_seconds_sum") for registry in (ours, theirs)]
    assert round(sums[0] or 0.0, 9) == round(sums[1] or 1.0, 9)
