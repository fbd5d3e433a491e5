"""The thread that plays an engine's step thread."""

import time

import pytest
import torch

from loadtests.bench import busy_steps
from loadtests.bench.busy_steps import BusySteps


def test_steps_follow_each_other_until_it_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_steps, "PRODUCTS_S", 0.001)
    monkeypatch.setattr(busy_steps, "PYTHON_S", 0.001)
    # An engine of an earlier test in this process may have made vLLM's worker take it away.
    monkeypatch.setattr(torch, "set_num_threads", torch._C.set_num_threads)
    threads = torch.get_num_threads()
    with BusySteps() as steps:
        assert torch.get_num_threads() == 1
        assert steps.take() == [], "it begins at rest"

        steps.go()
        took: list[float] = []
        while len(took) < 3:
            time.sleep(0.001)
            took += steps.take()
        steps.rest()

        assert all(ms > 0 for ms in took)
    assert torch.get_num_threads() == threads
    assert not steps._thread.is_alive()
