"""The limit of open files is raised as far as a process may."""

import resource

import pytest

from pd_serve.platform.open_files import MOST, allow_many_open_files

INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1024, 4096), (4096, 4096)),
        ((1024, INFINITE), (MOST, INFINITE)),
        ((1024, 10 * MOST), (MOST, 10 * MOST)),
        ((2 * MOST, 10 * MOST), None),
        ((INFINITE, INFINITE), None),
    ],
)
def test_a_lower_limit_is_raised(
    monkeypatch: pytest.MonkeyPatch, before: tuple[int, int], after: tuple[int, int] | None
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: before)
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: limits.append(limit))

    allow_many_open_files()

    assert limits == ([after] if after is not None else [])
