"""The CPU build of vLLM is recognised by its package."""

import importlib.metadata

import pytest

from pd_serve.platform.cpu import cpu_engine_defaults, is_cpu_build


@pytest.mark.parametrize("installed", [True, False])
def test_the_package_says_whether_it_is_the_cpu_build(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    def distribution(name: str) -> None:
        if not installed:
            raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    is_cpu_build.cache_clear()

    assert is_cpu_build() is installed

    is_cpu_build.cache_clear()


def test_defaults_are_a_new_mapping_each_time() -> None:
    cpu_engine_defaults()["block_size"] = 1

    assert cpu_engine_defaults()["block_size"] == 32
