"""`pd-serve bench profile`: the grid, what counts as a sample, and the CSV file that the simulator reads."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_serve.profiling.profile_points import (
    DECODE_STEPS,
    MIXED_CONTEXT,
    PHASES,
    WARM_UP_STEPS,
    Limits,
    Point,
    Row,
    StepSeen,
    points,
    relative_errors,
    rows,
    samples,
    write_csv,
)
from pd_serve.simulated_engine import cost_table
from pd_serve.simulated_engine.cost_model import LinearCostModel
from pd_serve.simulated_engine.hardware import hardware

ROOMY = Limits(step_tokens=2048, batch_size=64, model_tokens=8192, cache_tokens=1 << 17)
MODEL = LinearCostModel((3.0, 0.02, 1e-5), (2.0, 0.08, 6e-4))


@given(
    limits=st.builds(
        Limits,
        step_tokens=st.integers(16, 8192),
        batch_size=st.integers(1, 512),
        model_tokens=st.integers(64, 8192),
        cache_tokens=st.integers(64, 1 << 17),
    )
)
def test_the_grid_holds_only_what_the_engine_can_do(limits: Limits) -> None:
    found = points(limits)

    assert {point.phase for point in found} - {"mixed"} == {"prefill", "decode"}
    assert len(set(found)) == len(found)
    for point in found:
        assert point.batch_size <= limits.batch_size
        assert point.batch_size * point.tokens <= limits.cache_tokens
        if point.phase == "prefill":
            assert point.batch_size * point.tokens <= limits.step_tokens
        elif point.phase == "mixed":
            assert point.batch_size < limits.batch_size
            assert point.batch_size + point.tokens <= limits.step_tokens
            assert max(point.tokens, MIXED_CONTEXT + DECODE_STEPS) < limits.model_tokens
        else:
            assert point.tokens + DECODE_STEPS <= limits.model_tokens


def test_the_grid_is_enough_for_a_fit_and_begins_with_the_shortest() -> None:
    found = points(ROOMY)

    sizes = [point.batch_size * point.tokens for point in found]
    assert sizes == sorted(sizes)
    for phase in PHASES:
        assert len({p.tokens for p in found if p.phase == phase}) >= 3
        assert len({p.batch_size for p in found if p.phase == phase}) >= 3


def _decode(batch: int, context: int, ms: float) -> StepSeen:
    return StepSeen((), batch, context, ms)


def test_only_steps_over_all_prompts_and_nothing_else_are_samples_of_a_prefill() -> None:
    whole = StepSeen(((64, 0), (64, 0)), 0, 0, 4.0)
    others = [
        StepSeen(((64, 0),), 0, 0, 3.0),
        StepSeen(((64, 0), (32, 0)), 0, 0, 3.0),
        StepSeen(((64, 0), (64, 32)), 0, 0, 3.0),  # half of it was in the prefix cache
        StepSeen(((64, 0), (64, 0)), 1, 10, 5.0),
        _decode(2, 128, 2.0),
    ]

    assert samples(Point("prefill", 2, 64), [whole, *others]) == [whole]


def test_samples_of_decoding_are_the_whole_batch_warmed_up_and_not_ending() -> None:
    filling = [StepSeen(((32, 0),), 0, 0, 9.0), StepSeen(((32, 0),), 1, 32, 9.0)]
    steps = [_decode(2, 64 + 2 * i, float(i)) for i in range(10)]

    found = samples(Point("decode", 2, 32), [*filling, *steps, _decode(1, 50, 1.0)])

    assert found == steps[WARM_UP_STEPS:-1]


def test_samples_of_a_mixed_step_are_the_whole_batch_beside_one_whole_prompt() -> None:
    mixed = StepSeen(((64, 0),), 4, 160, 5.0)
    others = [
        StepSeen(((64, 0),), 3, 120, 5.0),
        StepSeen(((32, 0),), 4, 160, 4.0),
        StepSeen(((64, 0), (64, 0)), 4, 160, 8.0),
        _decode(4, 160, 2.0),
    ]

    assert samples(Point("mixed", 4, 64), [mixed, *others]) == [mixed]
    assert rows({Point("mixed", 4, 64): [mixed]}) == [Row("mixed", 4, 64, 160, 5.0)]


def test_rows_are_medians_and_leave_out_what_was_not_measured() -> None:
    prefill, decode, missing = Point("prefill", 4, 64), Point("decode", 2, 32), Point("decode", 64, 32)
    measured = {
        decode: [_decode(2, context, ms) for context, ms in ((70, 2.0), (72, 90.0), (74, 2.2))],
        prefill: [StepSeen(((64, 0),) * 4, 0, 0, ms) for ms in (5.0, 4.0)],
        missing: [],
    }

    assert rows(measured) == [Row("prefill", 4, 64, 0, 4.5), Row("decode", 2, 1, 72, 2.2)]


def _exact(model: LinearCostModel) -> list[Row]:
    blank = [Row("prefill", b, n, 0, 1.0) for b, n in ((1, 16), (1, 256), (1, 2048), (4, 128))]
    blank += [Row("decode", b, 1, context, 1.0) for b, context in ((1, 40), (8, 2000), (64, 3000), (8, 9000))]
    return [Row(r.phase, r.batch_size, r.new_tokens, r.context_tokens, r.model_ms(model)) for r in blank]


def test_the_simulator_reads_the_file_and_finds_the_model(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "steps.csv"

    write_csv(path, _exact(MODEL))
    fitted = cost_table.read(path)

    assert fitted.prefill_ms == pytest.approx(MODEL.prefill_ms, rel=1e-6)
    assert fitted.decode_ms == pytest.approx(MODEL.decode_ms, rel=1e-6)


def test_mixed_steps_have_a_constant_of_their_own(tmp_path: Path) -> None:
    model = replace(MODEL, mixed_ms=4.5)
    mixed = [Row("mixed", b, n, c, 1.0) for b, n, c in ((1, 64, 40), (8, 256, 400), (8, 1024, 400))]
    table = _exact(model) + [replace(row, ms=row.model_ms(model)) for row in mixed]

    write_csv(tmp_path / "steps.csv", table)
    fitted = cost_table.read(tmp_path / "steps.csv")

    assert fitted.mixed_ms == pytest.approx(4.5, rel=1e-5)
    assert relative_errors(table, fitted)["mixed"]["max"] == 0


def test_the_file_has_the_sizes_of_the_engine(tmp_path: Path) -> None:
    write_csv(tmp_path / "steps.csv", _exact(MODEL), {"num_blocks": 500, "block_tokens": 32})

    found = hardware(str(tmp_path / "steps.csv"))

    assert (found.engine.num_blocks, found.engine.block_tokens) == (500, 32)
    assert "kv_bytes_per_token" in found.unknown


def test_errors_are_relative_to_what_was_measured() -> None:
    table = _exact(MODEL)
    half = [Row(r.phase, r.batch_size, r.new_tokens, r.context_tokens, r.ms * 2) for r in table[:1]]

    assert relative_errors(table, MODEL) == {
        "prefill": {"median": 0.0, "max": 0.0},
        "decode": {"median": 0.0, "max": 0.0},
    }
    assert relative_errors(half, MODEL) == {"prefill": {"median": 0.5, "max": 0.5}}
