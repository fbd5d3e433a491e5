"""A start that would not fit into the machine's memory is refused."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.platform.memory import (
    PROCESS_BYTES,
    SIMULATED_BYTES,
    SIMULATED_PROCESS_BYTES,
    check_memory,
)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model with a GiB of weights."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2**30)
    return str(tmp_path)


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_instances_need_weights_cache_and_a_process_each(
    monkeypatch: pytest.MonkeyPatch, model: str, spare: int, fits: bool
) -> None:
    needed = 2 * (PROCESS_BYTES + 2**30 + 2**29) + PROCESS_BYTES
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed + spare))

    if fits:
        check_memory(2, {"kv_cache_memory_bytes": 2**29}, model)
    else:
        with pytest.raises(InvalidRequestError, match=r"2 instances need about 4\.8 GiB, 4\.8 GiB are free"):
            check_memory(2, {"kv_cache_memory_bytes": 2**29}, model)


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_each_worker_of_an_engine_is_a_process_with_a_cache_of_its_own(
    monkeypatch: pytest.MonkeyPatch, model: str, spare: int, fits: bool
) -> None:
    """The workers share the weights, and the instance has a process beside theirs."""
    needed = 2 * (5 * PROCESS_BYTES + 2**30 + 4 * 2**29) + PROCESS_BYTES
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed + spare))
    engine_args = {"kv_cache_memory_bytes": 2**29, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}

    if fits:
        check_memory(2, engine_args, model)
    else:
        with pytest.raises(InvalidRequestError, match="2 instances need about"):
            check_memory(2, engine_args, model)


@pytest.mark.parametrize(("per_process", "processes"), [(1, 64), (16, 4), (10, 7)])
@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_simulated_engines_need_neither_weights_nor_a_cache(
    monkeypatch: pytest.MonkeyPatch, model: str, spare: int, fits: bool, per_process: int, processes: int
) -> None:
    needed = processes * SIMULATED_PROCESS_BYTES + 64 * SIMULATED_BYTES + PROCESS_BYTES
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed + spare))

    if fits:
        engine_args = {"kv_cache_memory_bytes": 2**40}
        check_memory(64, engine_args, model, simulated=True, per_process=per_process)
    else:
        with pytest.raises(InvalidRequestError, match=r"64 instances need .* are free: start fewer$"):
            check_memory(64, {}, model, simulated=True, per_process=per_process)


def test_each_api_server_is_a_process(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    needed = PROCESS_BYTES + 2**30 + 4 * PROCESS_BYTES
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed))

    check_memory(1, {}, model, api_servers=4)
    with pytest.raises(InvalidRequestError):
        check_memory(1, {}, model, api_servers=5)
