"""The actors of a service, and what a manager learns from those that another one has started."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pd_serve.comm.timing import TERM_CHECK_S
from pd_serve.manager import note_keepers
from pd_serve.manager.instance_processes import InstanceProcesses
from pd_serve.manager.launcher import ManagerNotes
from pd_serve.manager.note_keepers import NAMESPACE, NoteKeepers, named_actors
from tests.virtual_time import in_virtual_time


def keeper(term: int) -> Any:
    async def keep(notes: ManagerNotes) -> int:
        return term

    return SimpleNamespace(keep_notes=SimpleNamespace(remote=keep))


async def at_once(function: Any, *arguments: Any) -> Any:
    return function(*arguments)


@in_virtual_time
async def test_an_instance_of_another_manager_is_found_and_asked() -> None:
    """The two managers share no instance: each has started its own while the other was not reached."""
    known = {"decode-0": keeper(3)}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(asyncio, "to_thread", at_once)
        monkeypatch.setattr(note_keepers, "named_actors", lambda service, without: known)
        keepers = NoteKeepers("s", InstanceProcesses(1))
        watching = asyncio.ensure_future(keepers.watch())
        await asyncio.sleep(1)
        assert await keepers.give(ManagerNotes(term=3)) == 3
        assert await keepers.are_ours()

        known["decode-1"] = keeper(4)
        await asyncio.sleep(TERM_CHECK_S)
        assert await keepers.give(ManagerNotes(term=3)) == 4
        assert not await keepers.are_ours()
        watching.cancel()
        await asyncio.wait([watching])


@in_virtual_time
async def test_an_error_of_rays_head_ends_no_search() -> None:
    errors: list[Exception] = [ray.exceptions.RaySystemError("no head")]

    def fails(service: str, without: Any) -> dict[str, Any]:
        if errors:
            raise errors.pop()
        return {}

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(asyncio, "to_thread", at_once)
        monkeypatch.setattr(note_keepers, "named_actors", fails)
        keepers = NoteKeepers("s", InstanceProcesses(1))
        await keepers.give(ManagerNotes(term=3))
        assert await keepers.wait()


def test_actors_of_other_services_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        ("s:decode-0", NAMESPACE),
        ("s:decode-1", NAMESPACE),
        ("s2:decode-0", NAMESPACE),
        ("s:x", "serve"),
    ]
    listed = [{"name": name, "namespace": namespace} for name, namespace in rows]
    monkeypatch.setattr(ray.util, "list_named_actors", lambda all_namespaces: listed)
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: f"{namespace}/{name}")
    assert named_actors("s", ["decode-1"]) == {"decode-0": f"{NAMESPACE}/s:decode-0"}
