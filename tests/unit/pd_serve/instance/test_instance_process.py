"""The process of an instance: start and stop, with a simulated engine and a transport in memory."""

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from migration.engine_interface import EngineFacts
from migration.transport.local import LocalFabric
from pd_serve.comm.wire import CurveKeys
from pd_serve.errors import InvalidRequestError
from pd_serve.instance import instance_process
from pd_serve.instance.instance_process import Instance, InstanceConfig
from pd_serve.simulated_engine.cost_model import COST_MODELS
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulated_engine.simulated_engine import SimulatedEngine


def config(**more: Any) -> InstanceConfig:
    settings = EngineSettings(COST_MODELS["a10-llama-7b"], num_blocks=100, block_tokens=16)
    return InstanceConfig("p0", "prefill", {}, "127.0.0.1", CurveKeys.generate(), simulated=settings, **more)


@pytest.fixture(autouse=True)
def imports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Threads that have imported the engines; the real import freezes the garbage collector's objects."""
    threads: list[str] = []

    def import_engine(*, simulated: bool) -> None:
        assert simulated
        threads.append(threading.current_thread().name)

    monkeypatch.setattr(instance_process, "import_engine", import_engine)
    monkeypatch.setattr(
        "migration.transport.nixl.NixlTransport", lambda name, on_failure: LocalFabric().transport(name)
    )
    return threads


def test_the_configuration_does_not_show_the_keys_of_the_cluster() -> None:
    made = config()

    assert made.keys.secret.decode() not in repr(made)


async def test_a_started_instance_tells_its_address_and_the_capacity_of_its_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PD_SERVE_TEST", raising=False)
    instance = Instance()

    info = await instance.start(config(environment={"PD_SERVE_TEST": "1"}))

    assert (info.instance_id, info.role, info.pid) == ("p0", "prefill", os.getpid())
    assert info.address.startswith("tcp://127.0.0.1:")
    assert (info.engine.num_blocks, info.engine.block_tokens) == (100, 16)
    assert os.environ.pop("PD_SERVE_TEST") == "1"
    assert await instance.llumlet.check_integrity() == []
    await instance.stop()


async def test_the_engine_is_imported_once_and_not_on_the_event_loop(imports: list[str]) -> None:
    instance = Instance()
    await instance.start(config())
    await instance.stop()

    assert len(imports) == 1
    assert imports != [threading.current_thread().name]


async def test_an_instance_that_never_started_can_be_stopped() -> None:
    instance = Instance()
    waiting = asyncio.create_task(instance.wait())
    await asyncio.sleep(0)
    assert not waiting.done()

    await instance.stop()

    await waiting


async def test_a_dead_engine_ends_the_whole_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    instance = Instance()
    await instance.start(config())

    instance.llumlet.events.on_death(RuntimeError("no memory is left"))

    assert codes == [1]
    assert "this instance ends: no memory is left" in caplog.text
    await instance.stop()


@pytest.mark.parametrize("needed", [True, False])
async def test_an_instance_that_has_to_move_requests_does_not_start_if_it_cannot(
    monkeypatch: pytest.MonkeyPatch, needed: bool
) -> None:
    facts = EngineFacts("speculative decoding", 512, 100, 16, ("generate",))
    monkeypatch.setattr(SimulatedEngine, "facts", facts)
    instance = Instance()

    if needed:
        with pytest.raises(InvalidRequestError, match="speculative decoding; start with --neutral"):
            await instance.start(config(needs_migration=True))
    else:
        info = await instance.start(config())
        assert info.engine.no_migration == "speculative decoding"
        await instance.stop()


async def test_a_dead_transport_ends_the_whole_process_and_nothing_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    made: list[Any] = []

    class HangingTransport:
        def __init__(self, name: str, on_failure: Callable[[BaseException], None]) -> None:
            self.inner = LocalFabric().transport(name)
            made.append(on_failure)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def close(self) -> None:
            pytest.fail("would wait for the thread that hangs")

    monkeypatch.setattr("migration.transport.nixl.NixlTransport", HangingTransport)
    instance = Instance()
    await instance.start(config())

    await asyncio.to_thread(made[0], RuntimeError("the reader hangs"))

    assert codes == [1]
    monkeypatch.setattr(HangingTransport, "close", lambda self: None)
    await instance.stop()
