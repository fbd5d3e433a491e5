"""LoRA adapters at run time: loaded on all instances, told to all API servers, kept for the next manager."""

import asyncio
from typing import Any

import pytest

from pd_serve.comm.membership import LoraAdapter, Membership
from pd_serve.comm.requests import Call, CallEngine, LoadAdapter, UnloadAdapter
from pd_serve.comm.rpc import Answer
from pd_serve.comm.timing import CALL_TIMEOUT_S
from pd_serve.errors import EngineDeadError, InvalidRequestError, UnknownTargetError
from pd_serve.manager import lora_adapters
from tests.members import instance_info
from tests.unit.pd_serve.manager.manager_world import FakeLauncher, World, a_world
from tests.virtual_time import in_virtual_time

FRENCH = LoraAdapter("french", "/adapters/french")
INSTANCES = ("decode-0", "decode-1", "prefill-0")


async def ask(world: World, request: Any, caller: str = "api", **errors: str) -> list[list[Any]]:
    """Calls the manager; the instances answer, with an error those that are given one.

    Returns: what the instances were called with.
    """
    asking = asyncio.create_task(world.call(request, caller))
    served: dict[tuple[str, str], CallEngine] = {}
    while not asking.done():
        await asyncio.sleep(0.01)
        for name in INSTANCES:
            for call in world.sent(Call, name):
                if (name, call.call_id) not in served and isinstance(call.request, CallEngine):
                    served[name, call.call_id] = call.request
                    error = errors.get(name.replace("-", "_"))
                    if error != "silence":
                        world.wire.hear(name, Answer(call.call_id, None, error, "PdServeError"))
    await asking
    assert all(call.method == "load_adapter" for call in served.values())
    return [call.arguments for call in list(served.values())[-3:]]


def told(world: World, name: str) -> list[LoraAdapter]:
    return world.sent(Membership, name)[-1].lora_adapters


def test_the_number_of_an_adapter_follows_from_name_and_path_and_is_small() -> None:
    other_path = LoraAdapter("french", "/adapters/french-2")
    numbers = {FRENCH.number, other_path.number, LoraAdapter("german", "/adapters/french").number}
    assert len(numbers) == 3
    assert all(0 < number < 2**31 for number in numbers), "int32 in vLLM's second model runner"
    assert LoraAdapter("french", "/adapters/french").number == FRENCH.number
    assert FRENCH.for_engine[:3] == ("french@/adapters/french", FRENCH.number, "/adapters/french")


@in_virtual_time
async def test_an_adapter_is_loaded_on_all_instances_and_told_to_all_api_servers() -> None:
    async with a_world() as world:
        world.joined.append("b")
        await asyncio.sleep(1)
        calls = await ask(world, LoadAdapter(FRENCH))
        assert calls == [[*FRENCH.for_engine, True]] * 3
        await asyncio.sleep(0.01)
        assert told(world, "api") == told(world, "b") == [FRENCH]
        assert world.launcher.notes is not None
        assert world.launcher.notes.lora_adapters == [FRENCH]
        await ask(world, UnloadAdapter("french"), "b")
        await asyncio.sleep(0.01)
        assert told(world, "api") == told(world, "b") == []
        assert world.launcher.notes.lora_adapters == []
        with pytest.raises(UnknownTargetError, match="no LoRA adapter 'french'"):
            await ask(world, UnloadAdapter("french"))


@in_virtual_time
async def test_a_second_api_server_with_the_same_flag_loads_nothing_again() -> None:
    async with a_world() as world:
        world.joined.append("b")
        await asyncio.sleep(1)
        await ask(world, LoadAdapter(FRENCH))
        calls = len(world.sent(Call))
        await ask(world, LoadAdapter(FRENCH), "b")
        assert len(world.sent(Call)) == calls
        await ask(world, LoadAdapter(FRENCH, reload=True), "b")
        assert len(world.sent(Call)) == calls + 3


@in_virtual_time
async def test_an_api_server_that_starts_takes_over_what_operators_have_replaced() -> None:
    async with a_world() as world:
        await ask(world, LoadAdapter(FRENCH, by_flag=True))
        newer = LoraAdapter("french", "/adapters/french-2")
        await ask(world, LoadAdapter(newer, reload=True))
        await ask(world, LoadAdapter(FRENCH, by_flag=True))
        assert world.members.lora_adapters == [newer]


@in_virtual_time
async def test_an_api_server_that_starts_does_not_bring_back_what_operators_have_unloaded() -> None:
    """Its files may be gone, and the API server would not start."""
    async with a_world() as world:
        await ask(world, LoadAdapter(FRENCH, by_flag=True))
        await ask(world, UnloadAdapter("french"))
        calls = len(world.sent(Call))
        await ask(world, LoadAdapter(FRENCH, by_flag=True))
        assert len(world.sent(Call)) == calls
        assert world.members.lora_adapters == []
        assert world.launcher.notes is not None
        assert world.launcher.notes.lora_flags == ["french"]
        await ask(world, LoadAdapter(FRENCH))
        assert world.members.lora_adapters == [FRENCH]


@in_virtual_time
async def test_a_name_is_given_once_unless_its_adapter_is_to_be_replaced() -> None:
    async with a_world() as world:
        await ask(world, LoadAdapter(FRENCH))
        newer = LoraAdapter("french", "/adapters/french-2")
        with pytest.raises(InvalidRequestError, match="'french' is loaded from /adapters/french; unload it"):
            await ask(world, LoadAdapter(newer))
        await ask(world, LoadAdapter(newer, reload=True))
        assert world.members.lora_adapters == [newer]


@in_virtual_time
async def test_an_adapter_that_one_instance_cannot_load_is_not_offered() -> None:
    async with a_world() as world:
        with pytest.raises(Exception, match="no such directory"):
            await ask(world, LoadAdapter(FRENCH), decode_1="no such directory")
        assert world.members.lora_adapters == []


@in_virtual_time
async def test_an_instance_that_dies_meanwhile_does_not_count() -> None:
    async with a_world() as world:
        asking = asyncio.create_task(ask(world, LoadAdapter(FRENCH), decode_1="silence"))
        await asyncio.sleep(1)
        assert not asking.done()
        world.launcher.on_lost("decode-1")
        await asking
        assert world.members.lora_adapters == [FRENCH]


@in_virtual_time
async def test_an_instance_that_does_not_answer_fails_the_load_in_bounded_time() -> None:
    async with a_world() as world:
        asking = asyncio.create_task(ask(world, LoadAdapter(FRENCH), decode_1="silence"))
        await asyncio.sleep(CALL_TIMEOUT_S + 1)
        with pytest.raises(EngineDeadError, match="decode-1 does not answer"):
            await asking
        assert world.members.lora_adapters == []


@in_virtual_time
async def test_their_number_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_adapters, "MAX_ADAPTERS", 1)
    async with a_world() as world:
        await ask(world, LoadAdapter(FRENCH))
        with pytest.raises(InvalidRequestError, match="no more may be"):
            await ask(world, LoadAdapter(LoraAdapter("german", "/adapters/german")))


@in_virtual_time
async def test_two_adapters_of_one_number_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraAdapter, "number", 7)
    async with a_world() as world:
        await ask(world, LoadAdapter(FRENCH))
        with pytest.raises(InvalidRequestError, match="give 'german' another name"):
            await ask(world, LoadAdapter(LoraAdapter("german", "/adapters/german")))


def test_the_next_manager_keeps_the_adapters() -> None:
    left: list[Any] = []

    @in_virtual_time
    async def first() -> None:
        async with a_world() as world:
            await ask(world, LoadAdapter(FRENCH))
            await ask(world, LoadAdapter(LoraAdapter("german", "/adapters/german"), by_flag=True))
            await ask(world, UnloadAdapter("german"))
            left.extend([world.names, world.launcher.notes])

    @in_virtual_time
    async def second() -> None:
        launcher = FakeLauncher()
        launcher.found, launcher.notes = [instance_info(name) for name in left[0]], left[1]
        world = World(launcher=launcher)
        assert await world.manager.take_over()
        await asyncio.sleep(1)
        await ask(world, LoadAdapter(LoraAdapter("german", "/adapters/german"), by_flag=True))
        assert told(world, "api") == [FRENCH]
        await world.close()

    first()
    second()
