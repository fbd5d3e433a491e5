"""Cached directories: complete or absent, and built once."""

import multiprocessing
from pathlib import Path

import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.models import resolve
from pd_serve.models.cache import cached_directory


def test_a_failed_build_leaves_nothing(cache: Path) -> None:
    def build(directory: Path) -> None:
        (directory / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached_directory("model-r1", build)
    assert [path.name for path in (cache / "models").iterdir()] == [".model-r1.lock"]


def test_of_two_processes_one_builds(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        assert len(set(pool.map(resolve, ["tiny"] * 4, chunksize=1))) == 1
    assert sorted(path.name for path in (cache / "models").iterdir()) == [".tiny-r1.lock", "tiny-r1"]


def test_a_cache_that_cannot_be_written_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PD_SERVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InvalidRequestError, match=r"cannot write to .*set PD_SERVE_CACHE"):
        cached_directory("key", lambda path: None)
