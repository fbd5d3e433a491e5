"""An instance in a process of its own whose engine hangs in a step while its event loop lives.

Run as a program, this file is the instance: its configuration, pickled, is its input.
"""

import asyncio
import pickle
import subprocess
import sys
from collections.abc import Callable

import msgspec
import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from migration.messages import RequestId
from pd_serve.api.codec import VllmCodec
from pd_serve.comm.membership import InstanceInfo
from pd_serve.comm.messages import AddRequest
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.instance.instance_process import Instance, InstanceConfig
from pd_serve.manager.launcher import ManagerNotes
from pd_serve.manager.manager import Manager
from pd_serve.manager.manager_config import ManagerConfig
from pd_serve.platform.placement import Placement
from pd_serve.scheduler.scheduler_process import SchedulerConfig
from pd_serve.simulated_engine.cost_model import COST_MODELS
from pd_serve.simulated_engine.settings import EngineSettings
from router.load import ROLES
from router.policies import policy_set

pytestmark = pytest.mark.integration

HOST = "127.0.0.1"
ENGINE = EngineSettings(COST_MODELS["a10-llama-7b"], num_blocks=100)


class ProcessLauncher:
    """Runs instances as child processes; the engine of the first one hangs in its first step."""

    def __init__(self) -> None:
        self.on_lost: Callable[[str], None] = lambda instance_id: None
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.stopped: list[str] = []

    async def launch(self, name: str, placement: Placement) -> None: ...

    def waits_for(self, name: str) -> str:
        return ""

    async def start(self, config: InstanceConfig) -> InstanceInfo:
        process = self.processes[config.instance_id] = _child("works" if self.processes else "hangs")
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(pickle.dumps(config))
        process.stdin.close()
        line = await asyncio.to_thread(process.stdout.readline)
        return msgspec.json.decode(line, type=InstanceInfo)

    def leave_starts(self) -> None: ...

    async def stop_instance(self, name: str) -> None:
        self.stopped.append(name)
        self.end(name)

    def end(self, name: str) -> None:
        process = self.processes[name]
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

    async def find(self) -> tuple[list[InstanceInfo], ManagerNotes | None]:
        return [], None

    async def keep_notes(self, notes: ManagerNotes) -> int:
        return notes.term

    async def start_scheduler(self, config: SchedulerConfig) -> tuple[str, int]:
        return f"tcp://{HOST}:9", 0

    async def scheduler_ended(self) -> None:
        await asyncio.Event().wait()


def _child(how: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


class Notices:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def step(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        self.warnings.append(text)


async def test_the_manager_replaces_an_instance_whose_engine_hangs_while_its_event_loop_lives() -> None:
    launcher, notices, keys = ProcessLauncher(), Notices(), CurveKeys.generate()
    config = ManagerConfig(
        model="simulated",
        instances={"prefill": 0, "decode": 0, "neutral": 1},
        autoscale={},
        max_instances=2,
        policies=policy_set("llumnix"),
        engine_args={role: {} for role in ROLES},
        placements={role: Placement() for role in ROLES},
        host=HOST,
        keys=keys,
        simulated=ENGINE,
    )
    manager = Manager(config, Wire("manager", HOST, keys), launcher, notices)
    client = Wire("api", HOST, keys)
    try:
        async with asyncio.timeout(300):
            await manager.start()
            (info,) = manager.register.infos.values()
            await asyncio.sleep(3)
            assert info.instance_id in manager.register, "idle, it makes no steps and is healthy"
            client.connect(info.instance_id, info.address)
            add = AddRequest(RequestId("r"), f"tcp://{HOST}:9", 0, None, [])
            client.send(info.instance_id, add, VllmCodec().encode_request(_request()))
            while info.instance_id in manager.register or not len(manager.register):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    finally:
        await client.close()
        await manager.close()
        for name in launcher.processes:
            launcher.end(name)
    assert launcher.stopped == [info.instance_id]
    assert f"{info.instance_id} hangs in a step of its engine" in notices.warnings[-1]


def _request() -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=8),
        pooling_params=None,
        arrival_time=1.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def _serve(config: InstanceConfig, *, hangs: bool) -> None:
    """The instance, with bounds of a second instead of minutes."""
    from functools import partial

    from pd_serve.comm import leases
    from pd_serve.simulated_engine import vllm_format
    from pd_serve.simulated_engine.faults import EngineFaults

    leases.STEP_S = leases.FIRST_STEPS_S = 1.0  # type: ignore[misc]
    faults = EngineFaults(hang_s=1e9 if hangs else 0.0)
    vllm_format.make_engine = partial(vllm_format.make_engine, faults=faults)

    async def run() -> None:
        instance = Instance()
        sys.stdout.buffer.write(msgspec.json.encode(await instance.start(config)) + b"\n")
        sys.stdout.flush()
        await instance.wait()

    asyncio.run(run())


if __name__ == "__main__":
    _serve(pickle.loads(sys.stdin.buffer.read()), hangs=sys.argv[1] == "hangs")
