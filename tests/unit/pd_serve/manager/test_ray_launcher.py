"""Errors of the connection to Ray."""

import pytest
import ray

from pd_serve.errors import PdServeError
from pd_serve.manager.ray_launcher import RayLauncher

SLOW = "The current node timed out during startup. This could happen because"


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local cluster's settings and token go into this process's environment."""
    monkeypatch.setattr("pd_serve.manager.ray_launcher.LOCAL_SETTINGS", {})
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 32)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def init(**options: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)


@pytest.mark.parametrize(
    ("error", "address", "line"),
    [
        (Exception(SLOW + "\nmore"), None, f"Ray does not start: {SLOW}"),
        (Exception(SLOW), "10.0.0.1:6379", f"no Ray cluster at 10.0.0.1:6379: {SLOW}"),
        (ConnectionError("nobody\nthere"), "auto", "no Ray cluster at auto: nobody"),
        (TimeoutError(), None, "Ray does not start: TimeoutError"),
    ],
)
def test_an_error_of_ray_becomes_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, address: str | None, line: str
) -> None:
    fail_with(monkeypatch, error)
    with pytest.raises(PdServeError) as caught:
        RayLauncher(address, {}).connect()
    assert str(caught.value) == line


def test_an_unexpected_error_is_raised_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, TypeError("init() got an unexpected keyword argument"))
    with pytest.raises(TypeError):
        RayLauncher(None, {}).connect()
