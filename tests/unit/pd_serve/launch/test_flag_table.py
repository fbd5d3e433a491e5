"""The stored table of vLLM's flags is that of the installed vLLM; without vLLM there is one clear line."""

import importlib.metadata
import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_PLUGINS", "")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from pd_serve.errors import PdServeError
from pd_serve.launch import flag_table as module
from pd_serve.launch.flag_table import FlagSpec, flag_table, table_of_vllm, vllm_version


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> None:
    flag_table.cache_clear()


def test_the_stored_table_is_that_of_the_installed_vllm() -> None:
    """After a change of vLLM's version: python -m pd_serve.launch.flag_table."""
    assert json.loads(module.FILE.read_text())["vllm"] == vllm_version()
    assert flag_table() == table_of_vllm()


def test_arity_and_kind_of_flags() -> None:
    table = flag_table()

    assert table["--max-model-len"] == FlagSpec("max_model_len", 1, False, True)
    assert table["--no-enable-prefix-caching"] == FlagSpec("enable_prefix_caching", 0, False, True)
    assert table["--lora-modules"] == FlagSpec("lora_modules", "+", False, False)
    assert table["--middleware"] == FlagSpec("middleware", 1, True, False)
    assert table["-tp"].dest == "tensor_parallel_size"


def test_another_version_of_vllm_is_asked_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stored = tmp_path / "table.json"
    stored.write_text('{"vllm": "0.1.0", "flags": {}}')
    monkeypatch.setattr(module, "FILE", stored)
    monkeypatch.setattr(module, "table_of_vllm", lambda: {"--new": FlagSpec("new", 0, False, True)})

    assert list(flag_table()) == ["--new"]


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(PdServeError, match=r"vLLM is not installed.*pip install"):
        flag_table()
