"""Errors of the connection to Ray, and calls to the actors of a service."""

import asyncio
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray

from pd_serve.errors import EngineDeadError, PdServeError
from pd_serve.manager import note_keepers, ray_launcher
from pd_serve.manager.launcher import ManagerNotes
from pd_serve.manager.ray_launcher import RayLauncher
from pd_serve.platform.placement import Placement
from tests.members import instance_info
from tests.virtual_time import in_virtual_time

SLOW = "The current node timed out during startup. This could happen because"


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def init(**options: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)


@pytest.mark.parametrize(
    ("error", "address", "line"),
    [
        (Exception(SLOW + "\nmore"), None, f"Ray does not start: {SLOW}"),
        (Exception(SLOW), "10.0.0.1:6379", f"no Ray cluster at 10.0.0.1:6379: {SLOW}"),
        (ConnectionError("nobody\nthere"), "auto", "no Ray cluster at auto: nobody"),
        (TimeoutError(), None, "Ray does not start: TimeoutError"),
        (OSError(30, "Read-only", "/tmp/ray"), None, "Ray does not start: [Errno 30] Read-only: '/tmp/ray'"),
    ],
)
def test_an_error_of_ray_becomes_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, address: str | None, line: str
) -> None:
    fail_with(monkeypatch, error)
    with pytest.raises(PdServeError) as caught:
        RayLauncher(address, {}).connect()
    assert str(caught.value) == line


def test_an_unexpected_error_is_raised_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, TypeError("init() got an unexpected keyword argument"))
    with pytest.raises(TypeError):
        RayLauncher(None, {}).connect()


class FakeActor:
    """Answers every call with one of the given results; None: it waits for resources, and never answers.

    A function makes the result of the call's arguments.
    """

    def __init__(self, **results: Any) -> None:
        self._results = results
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self._answer(method, arguments))

    async def _answer(self, method: str, arguments: tuple[Any, ...]) -> Any:
        self.calls.append((method, *arguments))
        result = self._results.get(method)
        if callable(result):
            return await result(*arguments)
        if isinstance(result, Exception):
            raise result
        return result if result is not None else await asyncio.Future()


def a_launcher(monkeypatch: pytest.MonkeyPatch, **actors: FakeActor) -> tuple[RayLauncher, list[Any]]:
    """Returns a launcher that finds these actors, and the list of those that it kills."""
    killed: list[Any] = []
    launcher = RayLauncher("auto", {}, service="s")
    named = {name.replace("_", "-"): actor for name, actor in actors.items()}
    for module in (ray_launcher, note_keepers):
        monkeypatch.setattr(module, "named_actors", lambda service, without=(): without_known(named, without))
    monkeypatch.setattr(ray, "kill", killed.append)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.util, "get_placement_group", lambda name: (_ for _ in ()).throw(ValueError()))
    monkeypatch.setattr(asyncio, "to_thread", at_once)
    return launcher, killed


def without_known(named: dict[str, FakeActor], known: Collection[str]) -> dict[str, FakeActor]:
    return {name: actor for name, actor in named.items() if name not in known}


async def at_once(function: Any, *arguments: Any) -> Any:
    return function(*arguments)


def absent_head(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """No blocking call to Ray returns until the event is set."""
    answers = asyncio.Event()

    async def late(function: Any, *arguments: Any) -> Any:
        await answers.wait()
        return function(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", late)
    return answers


@in_virtual_time
async def test_no_actor_is_placed_where_it_ends_with_the_manager() -> None:
    """If the manager has a placement group and no strategy is given, Ray places its actors there, too."""
    strategies: list[Any] = []

    def made_with(**options: Any) -> Any:
        strategies.append(options.get("scheduling_strategy"))
        return SimpleNamespace(remote=lambda *arguments: FakeActor(start=("tcp://scheduler", 1)))

    with pytest.MonkeyPatch.context() as monkeypatch:
        launcher, _ = a_launcher(monkeypatch)
        monkeypatch.setattr(ray, "remote", lambda cls: SimpleNamespace(options=made_with))
        await launcher.launch("neutral-0", Placement())
        await launcher.start_scheduler(cast(Any, None))
    assert strategies == ["DEFAULT", "DEFAULT"]


@in_virtual_time
async def test_keep_notes_returns_the_highest_term_that_an_instance_has_seen() -> None:
    """By this a manager learns that another one has taken over."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        dead = FakeActor(keep_notes=ray.exceptions.RayActorError())
        launcher, _ = a_launcher(monkeypatch)
        for name, actor in {"a": FakeActor(keep_notes=3), "b": FakeActor(keep_notes=4), "c": dead}.items():
            launcher._processes.add(name, name, actor)
        assert await launcher.keep_notes(ManagerNotes(term=3)) == 4


@pytest.mark.parametrize("leaves", [False, True])
@in_virtual_time
async def test_a_cancelled_start_ends_the_instance_unless_it_is_left_to_others(
    leaves: bool,
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        launcher, killed = a_launcher(monkeypatch)
        actor = FakeActor()
        launcher._processes.add("decode-0", "decode-0", actor)
        config: Any = SimpleNamespace(instance_id="decode-0")
        start = asyncio.ensure_future(launcher.start(config))
        await asyncio.sleep(1)
        if leaves:
            launcher.leave_starts()
        start.cancel()
        await asyncio.wait([start])
        await asyncio.sleep(0.1)
        assert killed == ([] if leaves else [actor])


@in_virtual_time
async def test_an_actor_that_waits_for_resources_does_not_hold_up_a_take_over() -> None:
    notes = ManagerNotes(term=2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        waiting, dead = FakeActor(), FakeActor(found=ray.exceptions.RayActorError())
        ready = FakeActor(found=([instance_info("decode-0")], notes))
        launcher, killed = a_launcher(monkeypatch, decode_0=ready, decode_1=waiting, decode_2=dead)
        assert await asyncio.wait_for(launcher.find(), 60) == ([instance_info("decode-0")], notes)
        assert killed == [waiting]
        await launcher._watchers.cancel()


class SharedProcess:
    """A launcher with one process of two instances, whose actor is a fake, and what becomes of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **results: Any) -> None:
        self.launcher, self.killed = a_launcher(monkeypatch)
        self.lost: list[str] = []
        self.launcher.on_lost = self.lost.append
        self.failed: dict[str, asyncio.Event] = {name: asyncio.Event() for name in ("decode-0", "decode-1")}
        self.actor = FakeActor(wait=self._wait, **results)
        monkeypatch.setattr(ray, "kill", self._kill)
        infos = [instance_info(name) for name in self.failed]
        process = self.launcher._processes.found("process-of-decode-0", self.actor, list(self.failed))
        for info in infos:
            self.launcher._keep(info, process)

    def _kill(self, actor: Any) -> None:
        self.killed.append(actor)
        for failed in self.failed.values():
            failed.set()

    async def _wait(self, instance_id: str) -> None:
        await self.failed[instance_id].wait()
        raise ray.exceptions.RayActorError


@in_virtual_time
async def test_an_instance_that_stops_leaves_its_neighbour_alone() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        shared = SharedProcess(monkeypatch, stop_one=True)

        await shared.launcher.stop_instance("decode-0")

        assert ("stop_one", "decode-0") in shared.actor.calls
        assert (shared.killed, shared.lost) == ([], [])

        await shared.launcher.stop_instance("decode-1")
        assert shared.killed == [shared.actor]
        await shared.launcher._watchers.cancel()


@in_virtual_time
async def test_a_process_that_does_not_stop_an_instance_ends_with_its_neighbours() -> None:
    """Nothing that was given up may go on later: its loop hangs, or it is stopped."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        shared = SharedProcess(monkeypatch)

        await shared.launcher.stop_instance("decode-0")
        await asyncio.sleep(0.1)

        assert shared.killed[0] is shared.actor
        assert shared.lost == ["decode-1"]


@in_virtual_time
async def test_an_instance_that_fails_alone_is_lost_alone() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        shared = SharedProcess(monkeypatch)

        shared.failed["decode-1"].set()
        await asyncio.sleep(0.1)

        assert (shared.killed, shared.lost) == ([], ["decode-1"])
        await shared.launcher._watchers.cancel()


@in_virtual_time
async def test_the_death_of_a_process_loses_all_its_instances() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        shared = SharedProcess(monkeypatch)

        shared._kill(shared.actor)
        await asyncio.sleep(0.1)

        assert sorted(shared.lost) == ["decode-0", "decode-1"]
        assert not list(shared.launcher._processes)


@in_virtual_time
async def test_a_process_that_lives_on_without_its_raylet_is_ended_with_its_last_instance() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        shared = SharedProcess(monkeypatch)
        ended: list[str] = []
        worker = cast(Any, SimpleNamespace(kill=lambda: ended.append("process")))
        shared.launcher._workers = dict.fromkeys(shared.failed, worker)
        shared.failed["decode-0"].set()
        await asyncio.sleep(1)
        assert ended == []
        shared.failed["decode-1"].set()
        await asyncio.sleep(1)
        assert ended == ["process"]
        await shared.launcher._watchers.cancel()


@in_virtual_time
async def test_a_death_is_known_at_once_while_ray_does_not_answer() -> None:
    """Ray's head is absent: `ray.kill` does not return. The requests have to go on elsewhere."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        shared = SharedProcess(monkeypatch)
        answers = absent_head(monkeypatch)

        for failed in shared.failed.values():
            failed.set()
        await asyncio.sleep(0.1)
        assert (sorted(shared.lost), shared.killed) == (["decode-0", "decode-1"], [])

        answers.set()
        await asyncio.sleep(0.1)
        assert shared.killed == [shared.actor]


@in_virtual_time
async def test_a_manager_that_was_cut_off_ends_nothing_of_the_next_one() -> None:
    """It has heard nothing of an instance, which the next manager uses meanwhile."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        answers = asyncio.Event()

        async def keep_notes(notes: ManagerNotes) -> int:
            await answers.wait()
            return notes.term + 1

        actor = FakeActor(keep_notes=keep_notes, stop_one=True)
        launcher, killed = a_launcher(monkeypatch)
        launcher._processes.add("decode-0", "decode-0", actor)
        head = absent_head(monkeypatch)
        assert await launcher.keep_notes(ManagerNotes(term=3)) == 0

        stop = asyncio.ensure_future(launcher.stop_instance("decode-0"))
        await asyncio.sleep(100)
        answers.set()
        head.set()
        await stop
        assert "stop_one" not in [method for method, *_ in actor.calls]
        assert killed == []


@in_virtual_time
async def test_a_manager_that_another_one_has_replaced_launches_nothing() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        launcher, _ = a_launcher(monkeypatch, decode_0=FakeActor(keep_notes=4))
        assert await launcher.keep_notes(ManagerNotes(term=3)) == 0
        with pytest.raises(EngineDeadError, match="another manager has taken over"):
            await launcher.launch("decode-1", Placement())


@in_virtual_time
async def test_a_launch_fails_while_ray_does_not_answer_and_what_it_starts_late_is_ended() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        launcher, killed = a_launcher(monkeypatch)
        answers = absent_head(monkeypatch)
        monkeypatch.setattr(launcher, "_new_actor", lambda name, placement: f"actor of {name}")
        with pytest.raises(EngineDeadError, match="Ray has not answered"):
            await launcher.launch("decode-0", Placement())
        assert "decode-0" not in launcher._processes

        answers.set()
        await asyncio.sleep(0.1)
        assert killed == ["actor of decode-0"]


@in_virtual_time
async def test_a_service_ends_in_time_while_ray_does_not_answer() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        shared = SharedProcess(monkeypatch, stop=True)
        answers = absent_head(monkeypatch)
        exits: list[float] = []
        monkeypatch.setattr(ray_launcher, "exit_without_ray", exits.append)
        monkeypatch.setattr(ray_launcher, "end_children", lambda timeout_s: None)

        await asyncio.wait_for(shared.launcher.stop(), 60)

        assert ("stop",) in shared.actor.calls
        assert exits == [ray_launcher.STOP_S]
        answers.set()
        await asyncio.sleep(0.1)


@pytest.mark.parametrize(("answer", "lives"), [(None, True), (True, False)])
@in_virtual_time
async def test_a_local_ray_that_got_the_signal_too_is_ended_without_waiting_for_it(
    answer: bool | None, lives: bool
) -> None:
    """Its processes still run and do not answer, or have ended."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        shared = SharedProcess(monkeypatch, stop=answer)
        shared.launcher._service, shared.launcher._is_local = None, True
        ended: list[float] = []
        monkeypatch.setattr(ray_launcher, "ray_lives", lambda: lives)
        monkeypatch.setattr(ray_launcher, "end_children", lambda timeout_s, others: ended.append(timeout_s))
        monkeypatch.setattr(ray, "shutdown", shared.killed.append)

        await shared.launcher.stop()

        assert (ended, shared.killed) == ([ray_launcher.STOP_S], [])


@in_virtual_time
async def test_instances_that_are_launched_together_share_a_process() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        launcher, _ = a_launcher(monkeypatch)
        launcher._processes.places = 2

        async def slow(function: Any, *arguments: Any) -> Any:
            await asyncio.sleep(1)
            return function(*arguments)

        monkeypatch.setattr(asyncio, "to_thread", slow)
        monkeypatch.setattr(launcher, "_new_actor", lambda name, placement: f"actor of {name}")
        await asyncio.gather(*(launcher.launch(f"decode-{n}", Placement()) for n in range(2)))

        assert [process.instances for process in launcher._processes] == [{"decode-0", "decode-1"}]


@in_virtual_time
async def test_a_cancelled_start_ends_the_instance_and_not_its_neighbour() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        shared = SharedProcess(monkeypatch, stop_one=True)
        config: Any = SimpleNamespace(instance_id="decode-0")
        start = asyncio.ensure_future(shared.launcher.start(config))
        await asyncio.sleep(1)

        start.cancel()
        await asyncio.wait([start])
        await asyncio.sleep(0.1)

        assert ("stop_one", "decode-0") in shared.actor.calls
        assert shared.killed == []
        await shared.launcher._watchers.cancel()


@in_virtual_time
async def test_a_take_over_finds_all_instances_of_a_process() -> None:
    infos = [instance_info("decode-0"), instance_info("decode-1")]
    with pytest.MonkeyPatch.context() as monkeypatch:
        actor = FakeActor(found=(infos, ManagerNotes(term=2)))
        launcher, killed = a_launcher(monkeypatch, **{"process_of_decode_0": actor})

        assert await launcher.find() == (infos, ManagerNotes(term=2))

        assert killed == []
        assert [process.instances for process in launcher._processes] == [{"decode-0", "decode-1"}]
        await launcher._watchers.cancel()
