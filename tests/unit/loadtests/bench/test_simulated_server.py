"""The simulated engine with equal steps."""

from pathlib import Path

import pytest

from loadtests.bench.simulated_server import simulated_server, write_step_table
from pd_serve.simulated_engine.cost_table import read


@pytest.mark.parametrize("step_ms", [2.0, 5.0])
def test_every_step_takes_the_same_time(tmp_path: Path, step_ms: float) -> None:
    model = read(write_step_table(tmp_path, step_ms))

    for coefficients in (model.prefill_ms, model.decode_ms):
        assert [round(c, 6) for c in coefficients] == [step_ms, 0.0, 0.0]


def test_the_server_has_one_simulated_engine(tmp_path: Path) -> None:
    command = simulated_server("ours", tmp_path / "steps.csv", 1234).command

    assert {"--neutral=1", "--engine=simulated", "--port=1234", f"--cost-model={tmp_path}/steps.csv"} <= set(
        command
    )
