"""An API server's LoRA adapters follow the manager's."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from pd_serve.comm.membership import LoraAdapter
from pd_serve.comm.requests import LoadAdapter, UnloadAdapter
from pd_serve.frontend.lora_adapters import OfferedAdapters
from pd_serve.frontend.manager_client import ManagerClient

FRENCH, GERMAN = LoraAdapter("french", "/french"), LoraAdapter("german", "/german")


class Manager:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.is_alive = True

    async def call(self, request: Any) -> None:
        self.calls.append(request)


def following(manager: Manager | None = None) -> tuple[OfferedAdapters, list[list[LoraAdapter]]]:
    adapters = OfferedAdapters(cast(ManagerClient, manager or Manager()))
    seen: list[list[LoraAdapter]] = []

    def see(present: Sequence[LoraAdapter]) -> None:
        seen.append(list(present))

    adapters.follow(see)
    assert seen.pop() == []
    return adapters, seen


async def test_what_is_loaded_before_the_first_client_comes_from_flags() -> None:
    manager = Manager()
    adapters = OfferedAdapters(cast(ManagerClient, manager))
    await adapters.load(FRENCH)
    adapters.follow(lambda present: None)
    await adapters.load(FRENCH)
    assert manager.calls == [LoadAdapter(FRENCH, by_flag=True), LoadAdapter(FRENCH)]


async def test_an_api_server_that_starts_waits_for_the_manager() -> None:
    """It may have heard nothing for some seconds itself, on a busy machine; at run time that is an error."""
    manager = Manager()
    manager.is_alive = False
    adapters = OfferedAdapters(cast(ManagerClient, manager))
    loading = asyncio.create_task(adapters.load(FRENCH))
    await asyncio.sleep(0)
    assert manager.calls == []
    manager.is_alive = True
    await loading
    assert manager.calls == [LoadAdapter(FRENCH, by_flag=True)]


async def test_the_manager_is_asked_to_load_and_unload() -> None:
    manager = Manager()
    adapters, seen = following(manager)
    await adapters.load(FRENCH)
    await adapters.load(FRENCH, reload=True)
    await adapters.unload("french")
    assert manager.calls == [LoadAdapter(FRENCH), LoadAdapter(FRENCH, reload=True), UnloadAdapter("french")]
    assert seen == [], "what the membership says counts"


def test_only_changes_are_told() -> None:
    """A heartbeat that was sent before an adapter was loaded must not take it away again."""
    adapters, seen = following()
    for present in ([], [FRENCH], [FRENCH], [FRENCH, GERMAN], [GERMAN], [GERMAN], []):
        adapters.on_membership(present)
    assert seen == [[FRENCH], [FRENCH, GERMAN], [GERMAN], []]


def test_what_was_told_before_is_told_to_who_follows_later() -> None:
    """Also that there is none: operators may have unloaded what the flags name."""
    for told in ([FRENCH], []):
        adapters = OfferedAdapters(cast(ManagerClient, Manager()))
        adapters.on_membership(told)
        seen: list[list[LoraAdapter]] = []
        adapters.follow(lambda present, seen=seen: seen.append(list(present)))
        assert seen == [told]
