"""What an agent for GPU memory does around NIXL's calls. Without a GPU: NIXL and CUDA are played."""

import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from migration.transport import nixl_agent
from migration.transport.kv_transport import KvRegion
from migration.transport.nixl_agent import NixlAgent

VRAM = [KvRegion(address=1 << 20, num_blocks=4, block_bytes=256, device_id=0)]
DRAM = [KvRegion(address=1 << 20, num_blocks=4, block_bytes=256)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls of NIXL and CUDA in order, each with its thread."""
    made: list[tuple[Any, ...]] = []

    def record(*call: Any) -> None:
        made.append((*call, threading.current_thread().name))

    class Agent:
        def __init__(self, name: str, config: Any) -> None:
            pass

        def createBackend(self, name: str, options: dict[str, str]) -> None:
            record("backend", {name: os.environ.get(name) for name in nixl_agent.ENVIRONMENT})

        def registerMem(self, descriptors: Any, backends: Any) -> None:
            record("register", descriptors)

    bindings = SimpleNamespace(
        nixlAgent=Agent,
        nixlAgentConfig=SimpleNamespace,
        nixlRegDList=lambda kind, ranges: (kind, ranges),
        NIXL_THREAD_SYNC_NONE=0,
        VRAM_SEG="VRAM",
        DRAM_SEG="DRAM",
    )
    monkeypatch.setattr(nixl_agent, "_import_bindings", lambda for_gpu: bindings)
    # A new thread's device is 0, without a context: torch then does nothing.
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: record("set device", str(device)))
    monkeypatch.setattr(torch, "zeros", lambda size, device: record("allocate", str(device)))
    for name in nixl_agent.ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return made


def test_each_thread_that_uses_gpu_memory_has_a_cuda_context_before_ucx_looks_for_one(
    calls: list[tuple[Any, ...]],
) -> None:
    agent = NixlAgent("a", VRAM, progress_thread=False)
    thread = threading.Thread(target=agent.enter_thread, name="reader")
    thread.start()
    thread.join()

    assert [call[0] for call in calls] == [
        *("set device", "allocate", "backend", "register"),
        *("set device", "allocate"),
    ]
    assert {call[1] for call in calls if call[0] == "allocate"} == {"cuda:0"}
    assert [call[-1] for call in calls[-2:]] == ["reader", "reader"]


def test_gpu_memory_is_registered_as_such_and_each_region_by_itself(calls: list[tuple[Any, ...]]) -> None:
    """Two regions that touch may be two allocations."""
    after = KvRegion(VRAM[0].address + 4 * 256, 4, 256, device_id=0)
    NixlAgent("a", [*VRAM, after], progress_thread=False)

    (registered,) = [call[1] for call in calls if call[0] == "register"]
    assert registered == ("VRAM", [(1 << 20, 1024, 0, ""), (after.address, 1024, 0, "")])


def test_an_agent_without_gpu_memory_leaves_cuda_alone(calls: list[tuple[Any, ...]]) -> None:
    NixlAgent("a", DRAM, progress_thread=False).enter_thread()

    assert [call[0] for call in calls] == ["backend", "register"]


def test_ucx_is_set_up_as_vllm_and_nixl_do_it_unless_the_user_has_set_it(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_RCACHE_MAX_UNRELEASED", "7")
    NixlAgent("a", DRAM, progress_thread=False)

    found = calls[0][1]
    assert found["UCX_RCACHE_MAX_UNRELEASED"] == "7"
    assert found["UCX_CUDA_IPC_ENABLE_GET_ZCOPY"] == "on", "reads between GPUs without NVLink"
