"""`pd-serve bench profile` with a few kinds of steps of the real engine with the tiny model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pd_serve.profiling import engine_profile as profile
from pd_serve.profiling.profile_points import DECODE_STEPS, PHASES, WARM_UP_STEPS, Point, rows, write_csv
from pd_serve.simulated_engine import cost_table
from pd_serve.simulated_engine.hardware import hardware
from tests.integration.instance_environment import instance_environment

pytestmark = pytest.mark.integration

POINTS = [
    Point("prefill", 1, 16),
    Point("prefill", 4, 64),
    Point("mixed", 4, 64),
    Point("prefill", 1, 512),
    Point("decode", 1, 32),
    Point("decode", 4, 32),
    Point("decode", 8, 96),  # more than one step fills its cache
]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the benchmark sets for the whole process ends with the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with instance_environment():
        yield


async def test_steps_of_a_real_engine_become_a_cost_model(tmp_path: Path) -> None:
    flags = ["--max-num-batched-tokens=512", "--max-num-seqs=8", "--max-model-len=1024"]
    engine = await profile.start_engine("tiny", flags)
    try:
        about, limits = engine.about, engine.limits
        measured = await profile.measure(engine, POINTS, seconds=0.1)
    finally:
        await engine.close()

    assert (limits.step_tokens, limits.batch_size) == (512, 8)
    assert about["block_tokens"] == 32
    assert about["kv_bytes_per_token"] == 4096
    assert about["threads"] == 1
    for point, steps in measured.items():
        assert all(step.ms > 0 for step in steps)
        if point.phase == "decode":
            first, last = steps[0].context_tokens, steps[-1].context_tokens
            assert len(steps) >= DECODE_STEPS - WARM_UP_STEPS - 3
            # How many of a batch have begun with the first step that is kept depends on the machine.
            assert first >= point.batch_size * point.tokens
            assert last < point.batch_size * (point.tokens + DECODE_STEPS)
    table = rows(measured)
    assert [(row.phase, row.batch_size) for row in table] == [
        (p.phase, p.batch_size) for p in sorted_points()
    ]

    write_csv(tmp_path / "steps.csv", table, profile.sizes(about))
    fitted = cost_table.read(tmp_path / "steps.csv")
    engine_settings = hardware(str(tmp_path / "steps.csv")).engine

    assert fitted.prefill_s([(512, 0)]) > fitted.prefill_s([(16, 0)]) > 0
    assert fitted.decode_s(8, 800) > 0
    assert fitted.mixed_ms is not None
    assert (engine_settings.chunk_tokens, engine_settings.max_num_seqs) == (512, 8)
    assert engine_settings.kv_bytes_per_token == 4096


def sorted_points() -> list[Point]:
    return sorted(POINTS, key=lambda p: (PHASES.index(p.phase), p.batch_size, p.tokens))
