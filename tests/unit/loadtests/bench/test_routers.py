"""Numbers of the processes in front of the engines."""

from loadtests.bench.rounds import Round
from loadtests.bench.routers import MANY, ONE, OURS, SGLANG_ROUTER, STUB, VLLM_ROUTER, summary
from tests.unit.loadtests.bench.made_outcomes import made_outcome


def test_routers_are_measured_against_the_stub_and_ours_against_a_step() -> None:
    def rounds(ttft_s: float, cpu_s: float) -> dict[str, list[Round]]:
        one = Round(1.0, cpu_s, 1.0, [made_outcome(ttft_s, (0.002,), 2)] * 4)
        return {ONE.name: [one], MANY.name: [one]}

    found = summary({STUB: rounds(0.004, 0.4), VLLM_ROUTER: rounds(0.005, 0.004), OURS: rounds(0.007, 0.008)})

    assert "added_ttft_ms" not in found[STUB]
    assert found[VLLM_ROUTER]["added_ttft_ms"] == 1.0
    assert found[VLLM_ROUTER]["requests_per_s_per_core"] == 1000.0
    assert found[OURS]["added_ttft_ms"] == 5.0
    assert SGLANG_ROUTER not in found
