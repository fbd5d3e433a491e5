"""A cost model from a CSV file."""

from pathlib import Path

import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine.cost_model import COST_MODELS, LinearCostModel
from pd_serve.simulated_engine.cost_table import read, read_sizes

HEADER = "phase,batch_size,new_tokens,context_tokens,ms"


def written(path: Path, model: LinearCostModel) -> Path:
    rows = [HEADER]
    for batch, new in ((1, 16), (1, 256), (1, 4096), (4, 128), (2, 1024)):
        rows.append(f"prefill,{batch},{new},0,{model.prefill_s([(new, 0)] * batch) * 1e3}")
    for batch, context in ((1, 100), (8, 800), (64, 3000), (8, 9000)):
        rows.append(f"decode,{batch},1,{context},{model.decode_s(batch, context) * 1e3}")
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize("name", COST_MODELS)
def test_a_fit_recovers_the_model_that_made_the_times(name: str, tmp_path: Path) -> None:
    model = COST_MODELS[name]

    found = read(written(tmp_path / "measured.csv", model))

    assert found.prefill_ms == pytest.approx(model.prefill_ms, rel=1e-6)
    assert found.decode_ms == pytest.approx(model.decode_ms, rel=1e-6)


def test_no_cost_falls_with_size(tmp_path: Path) -> None:
    path = written(tmp_path / "measured.csv", LinearCostModel((5, 0.2, 0), (38, 0.5, -1e-3)))

    found = read(path)

    assert min(*found.prefill_ms, *found.decode_ms) >= 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n", "must have the columns"),
        (f"{HEADER}\nprefill,1,16,0,5\n", "at least 3 rows"),
        (f"{HEADER}\nidle,1,16,0,5\n", "phase 'idle'"),
        (f"{HEADER}\nprefill,1,x,0,5\n", "cannot be read"),
    ],
)
def test_a_file_without_the_columns_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)

    with pytest.raises(InvalidRequestError, match=message):
        read(path)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "picture.csv"
    path.write_bytes(b"\x89PNG\xff\xfe")

    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read(path)


@pytest.mark.parametrize("ms", ["0", "-1", "nan"])
def test_a_step_without_duration_is_refused(ms: str, tmp_path: Path) -> None:
    path = tmp_path / "zero.csv"
    path.write_text(f"{HEADER}\ndecode,1,1,100,{ms}\n")

    with pytest.raises(InvalidRequestError, match="a step of"):
        read(path)


def test_sizes_stand_above_the_columns(tmp_path: Path) -> None:
    path = written(tmp_path / "measured.csv", COST_MODELS["a10-llama-7b"])
    path.write_text(f"# any remark\n# num_blocks: 500\n# kv_bytes_per_s: 2.5e9\n{path.read_text()}")

    assert read_sizes(path) == {"num_blocks": 500, "kv_bytes_per_s": 2.5e9}
    assert read(path).decode_ms == pytest.approx(COST_MODELS["a10-llama-7b"].decode_ms, rel=1e-6)


@pytest.mark.parametrize("line", ["# blocks: 500", "# num_blocks: many", "# num_blocks: 0"])
def test_a_size_that_is_unknown_or_no_number_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "sizes.csv"
    path.write_text(f"{line}\n{HEADER}\n")

    with pytest.raises(InvalidRequestError, match="must be one of num_blocks"):
        read_sizes(path)
