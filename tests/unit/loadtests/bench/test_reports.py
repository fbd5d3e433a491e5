"""The summary of the benchmark of reports."""

from loadtests.bench.reports import summary
from pd_serve.comm.timing import REQUEST_REPORT_INTERVAL_S


def test_the_share_is_that_of_the_median_report_in_the_interval_of_the_service() -> None:
    result = summary([10.0, 20.0, 90.0], [0.5, 0.4, 9.0])

    assert (result["step_ms"], result["report_ms"], result["reports"]) == (20.0, 0.5, 3)
    assert result["share"] == 0.5 / (REQUEST_REPORT_INTERVAL_S * 1e3)
    assert result["report_per_step_time"] == 0.025
