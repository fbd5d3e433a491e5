"""`pd-serve bench serve`: its engine, and the figures that it shows."""

from pathlib import Path

from loadtests.bench.ingress import STEP_MS, _cost_model, summary
from loadtests.bench.overhead import Load, Measured
from pd_serve.simulated_engine.cost_table import read


def test_every_step_takes_the_same(tmp_path: Path) -> None:
    model = read(_cost_model(tmp_path))
    for coefficients in (model.prefill_ms, model.decode_ms):
        assert [round(c, 6) for c in coefficients] == [STEP_MS, 0.0, 0.0]


def test_summary_is_of_medians() -> None:
    rounds = [Measured(100.0, 5.0, 1.0, 0.1), Measured(300.0, 9.0, 3.0, 0.3), Measured(110.0, 6.0, 1.5, 0.2)]
    assert summary({"one": {Load(4, 8): rounds}}) == {
        "one": {"4": {"output_tokens_per_s": 110.0, "ttft_ms": 6.0, "itl_ms": 1.5, "cpu_ms_per_token": 0.2}}
    }
