"""What the tests of experiments share."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from loadtests.experiments import result_store


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulations run in a thread: the imports of a process of their own take longer than a small one."""
    monkeypatch.setattr(result_store, "spawned_pool", lambda number: ThreadPoolExecutor(1))
