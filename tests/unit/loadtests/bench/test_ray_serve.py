"""The summary of the benchmark of Ray Serve's proxies."""

from loadtests.bench.ray_serve import summary
from loadtests.bench.rounds import RoundMedians


def test_the_summary_has_medians() -> None:
    rounds = [
        RoundMedians(100.0, 5.0, 1.0, 0.1),
        RoundMedians(300.0, 9.0, 3.0, 0.3),
        RoundMedians(110.0, 6.0, 1.5, 0.2),
    ]
    assert summary({"one": {"4": rounds}}) == {
        "one": {"4": {"output_tokens_per_s": 110.0, "ttft_ms": 6.0, "itl_ms": 1.5, "cpu_ms_per_token": 0.2}}
    }
