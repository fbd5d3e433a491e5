"""The process of several instances, with simulated engines: each one ends alone."""

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from migration.transport.local import LocalFabric
from pd_serve.comm.messages import SetRole
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.errors import EngineDeadError
from pd_serve.instance import instance_process
from pd_serve.instance.instance_process import InstanceConfig
from pd_serve.manager import ray_actors
from pd_serve.manager.launcher import ManagerNotes
from pd_serve.manager.ray_actors import InstanceActor
from pd_serve.observe.logs import INSTANCE
from pd_serve.simulated_engine.cost_model import COST_MODELS
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulated_engine.simulated_engine import SimulatedEngine

KEYS = CurveKeys.generate()


def config(name: str) -> InstanceConfig:
    settings = EngineSettings(COST_MODELS["a10-llama-7b"], num_blocks=100, block_tokens=16)
    return InstanceConfig(name, "decode", {}, "127.0.0.1", KEYS, simulated=settings)


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit statuses with which the process would have ended."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


@pytest.fixture
async def actor(monkeypatch: pytest.MonkeyPatch, exits: list[int]) -> AsyncIterator[InstanceActor]:
    """The process of decode-0, decode-1 and decode-2."""
    monkeypatch.setattr(ray_actors, "configure_logging", lambda name: None)
    monkeypatch.setattr(instance_process, "import_engine", lambda *, simulated: None)
    fabric = LocalFabric()
    monkeypatch.setattr(
        "migration.transport.nixl.NixlTransport", lambda name, on_failure: fabric.transport(name)
    )
    actor = InstanceActor("process-of-decode-0", places=3)
    await asyncio.gather(*(actor.start(config(f"decode-{number}")) for number in range(3)))
    yield actor
    await actor.stop()


async def found(actor: InstanceActor) -> list[str]:
    infos, _ = await actor.found()
    return [info.instance_id for info in infos]


async def test_an_instance_that_fails_ends_alone(actor: InstanceActor, exits: list[int]) -> None:
    """Its sockets are closed, and its neighbours go on."""
    waiting = asyncio.ensure_future(actor.wait("decode-1"))
    failing = actor._instances["decode-1"]

    failing.llumlet.events.on_death(RuntimeError("no memory is left"))

    with pytest.raises(EngineDeadError, match="RuntimeError: no memory is left"):
        await asyncio.wait_for(waiting, 10)
    assert exits == []
    assert not failing._wire.send("manager", None)
    assert await found(actor) == ["decode-0", "decode-2"]
    for name in ("decode-0", "decode-2"):
        assert await actor._instances[name].llumlet.check_integrity() == []


async def test_a_failure_is_one_also_if_closing_fails(
    actor: InstanceActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = actor._instances["decode-1"]

    async def stop() -> None:
        raise KeyError("r1")

    monkeypatch.setattr(failing._engine, "stop", stop)
    failing.llumlet.events.on_death(RuntimeError("no memory is left"))

    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(actor.wait("decode-1"), 10)


async def test_the_failure_of_the_last_instance_ends_the_process(
    actor: InstanceActor, exits: list[int]
) -> None:
    await actor.stop_one("decode-0")
    # Both at once, as when no manager has sent anything for long: neither waits for the other's end.
    for name in ("decode-1", "decode-2"):
        assert exits == []
        actor._instances[name].llumlet.events.on_death(RuntimeError("no manager"))

    assert exits == [1]


async def test_an_instance_that_stops_leaves_the_others_alone(actor: InstanceActor) -> None:
    await actor.stop_one("decode-0")
    await actor.stop_one("decode-7")

    await actor.wait("decode-0")
    assert await found(actor) == ["decode-1", "decode-2"]


async def test_a_start_that_is_given_up_frees_what_it_has_opened(
    actor: InstanceActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = asyncio.Event()
    monkeypatch.setattr(SimulatedEngine, "start", lambda engine: never.wait())
    start = asyncio.ensure_future(actor.start(config("decode-3")))
    async with asyncio.timeout(10):
        while not hasattr(actor._instances.get("decode-3"), "_engine"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    await asyncio.wait_for(actor.stop_one("decode-3"), 10)

    assert start.cancelled() or isinstance(start.exception(), asyncio.CancelledError)
    assert actor._instances["decode-3"]._wire._context.closed
    assert await found(actor) == ["decode-0", "decode-1", "decode-2"]


async def test_the_next_manager_does_not_wait_for_a_start_that_hangs(
    actor: InstanceActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = asyncio.Event()
    monkeypatch.setattr(SimulatedEngine, "start", lambda engine: never.wait())
    monkeypatch.setattr(ray_actors, "READY_S", 0.05)
    start = asyncio.ensure_future(actor.start(config("decode-3")))
    await asyncio.sleep(0)

    assert await found(actor) == ["decode-0", "decode-1", "decode-2"]
    await asyncio.wait([start])
    assert start.cancelled()


async def test_an_instance_that_is_ordered_again_is_started_once(actor: InstanceActor) -> None:
    """The first answer was lost, or is late."""
    orders = [actor.start(config("decode-3")) for _ in range(2)]
    first, second = await asyncio.gather(*orders)

    assert first == second == await actor.start(config("decode-3"))
    assert await found(actor) == ["decode-0", "decode-1", "decode-2", "decode-3"]


async def test_the_latest_notes_are_kept(actor: InstanceActor) -> None:
    assert await actor.keep_notes(ManagerNotes(term=3)) == 3
    assert await actor.keep_notes(ManagerNotes(term=2)) == 3
    assert (await actor.found())[1] == ManagerNotes(term=3)


async def fail_to_start(actor: InstanceActor, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(engine: SimulatedEngine) -> None:
        raise RuntimeError("no such model")

    with monkeypatch.context() as patched:
        patched.setattr(SimulatedEngine, "start", fails)
        with pytest.raises(RuntimeError, match="no such model"):
            await actor.start(config(name))


async def test_a_process_whose_start_has_failed_ends_itself_if_no_manager_ends_it(
    monkeypatch: pytest.MonkeyPatch, actor: InstanceActor, exits: list[int]
) -> None:
    monkeypatch.setattr(ray_actors, "ORPHAN_S", 0.05)
    await fail_to_start(actor, "decode-3", monkeypatch)
    await asyncio.sleep(0.2)
    assert exits == []  # the others serve

    alone = InstanceActor("decode-4")
    await fail_to_start(alone, "decode-4", monkeypatch)
    assert exits == []
    async with asyncio.timeout(10):
        while not exits:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await alone.stop()


@pytest.mark.parametrize("has_notes", [True, False])
async def test_a_process_that_no_manager_starts_an_instance_in_ends_itself(
    monkeypatch: pytest.MonkeyPatch, exits: list[int], has_notes: bool
) -> None:
    """Its manager may have died while Ray created it, before any call."""
    monkeypatch.setattr(ray_actors, "configure_logging", lambda name: None)
    monkeypatch.setattr(ray_actors, "START_TIMEOUT_S", 0.05)

    left = InstanceActor("decode-4")
    if has_notes:
        await left.keep_notes(ManagerNotes(term=3))

    async with asyncio.timeout(10):
        while not exits:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_process_with_an_instance_outlives_the_time_of_a_start(
    monkeypatch: pytest.MonkeyPatch, actor: InstanceActor, exits: list[int]
) -> None:
    with monkeypatch.context() as soon:
        soon.setattr(ray_actors, "START_TIMEOUT_S", 0.5)
        other = InstanceActor("decode-4")
    await other.start(config("decode-4"))

    await asyncio.sleep(0.7)

    assert exits == []
    assert await found(other) == ["decode-4"]
    await other.stop()


async def test_what_an_instance_logs_has_its_name(
    actor: InstanceActor, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray's prefix is that of the process. A message that makes no sense is logged by its receiver."""
    names: list[str] = []
    caplog.handler.addFilter(lambda record: names.append(INSTANCE.get()) is None)
    sender = Wire("peer", "127.0.0.1", KEYS)
    infos, _ = await actor.found()
    for info in infos:
        sender.connect(info.instance_id, info.address)
        sender.send(info.instance_id, SetRole("no role"))
    async with asyncio.timeout(10):
        while len(names) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await sender.close()

    assert sorted(names) == ["decode-0", "decode-1", "decode-2"]
