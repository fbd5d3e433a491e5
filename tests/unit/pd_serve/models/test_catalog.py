"""Names of models: what each becomes, and one clear line when a name is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.models import DEFAULT_MODEL, default_dtype, resolve, served_name
from pd_serve.models.catalog import demo_names


def test_a_demo_model_is_made_once() -> None:
    directory = Path(resolve("tiny"))
    made_at = (directory / "model.safetensors").stat().st_mtime_ns
    assert resolve("TINY") == str(directory)
    assert (directory / "model.safetensors").stat().st_mtime_ns == made_at


@pytest.mark.parametrize("name", ["org/model", "gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_hub_names_are_left_alone(name: str) -> None:
    assert resolve(name) == name
    assert served_name(name) == name


def test_existing_paths_are_left_alone(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("name", ["", "/no/such/model", "./model", "~/no-such-model", "a/b/c", "model/"])
def test_a_path_to_nothing_is_one_clear_line(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^model .* does not exist: give .* tiny$"):
        resolve(name)


def test_demo_models_have_short_served_names() -> None:
    names = [served_name(name) for name in ("smollm2", "smollm2-135m-instruct", "tiny", "bench")]
    assert names == ["SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct", "tiny", "bench"]
    assert DEFAULT_MODEL in demo_names()


def test_demo_models_run_in_float32_unless_told_otherwise() -> None:
    assert {default_dtype(name) for name in demo_names()} == {"float32"}
    assert default_dtype("org/model") is None


def test_importing_imports_nothing_that_takes_seconds() -> None:
    code = "import sys, pd_serve.models; print({'torch', 'transformers', 'gguf', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_command_prints_the_directory_only() -> None:
    done = subprocess.run([sys.executable, "-m", "pd_serve.models", "tiny"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, resolve("tiny"), "")
