"""API servers are kept running: each that ends is replaced, and those that never start are an error."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from pd_serve.comm.timing import API_SERVER_STOP_S, EARLY_DEATH_S, MAX_DEATH_PAUSE_S, START_BACKOFF_S
from pd_serve.errors import InvalidRequestError, PdServeError
from pd_serve.launch.api_server_child import ApiServerChild
from pd_serve.launch.api_server_keeper import MAX_FAILED_STARTS, ApiServerKeeper
from pd_serve.launch.api_server_messages import FlagsParsed, JoinCluster
from tests.virtual_time import in_virtual_time

CLUSTER = JoinCluster("127.0.0.1", "tcp://manager")

#: Time that a played process takes for each half of its start.
START_S = 5.0


class PlayedChild:
    """Implements `ApiServerChild` without a process.

    Attributes:
        fails: Raised when its flags are parsed, in their place.
        finishes_in_s: Time that it takes to end after `terminate`.
    """

    def __init__(self, name: str, pid: int, fails: PdServeError | None, finishes_in_s: float) -> None:
        self.name, self.pid = name, pid
        self.joined: JoinCluster | None = None
        self.end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._fails = fails
        self._finishes_in_s = finishes_in_s

    async def flags(self) -> FlagsParsed:
        await asyncio.sleep(START_S)
        if self._fails is not None:
            raise self._fails
        return FlagsParsed(cast(Any, "configuration"), "tiny", False)

    async def join(self, cluster: JoinCluster) -> None:
        await asyncio.sleep(START_S)
        self.joined = cluster

    async def ended(self) -> str:
        return await asyncio.shield(self.end)

    def terminate(self) -> None:
        asyncio.get_running_loop().call_later(self._finishes_in_s, self._end, "has ended with exit code 0")

    def kill(self) -> None:
        self._end("was killed by SIGKILL")

    def _end(self, why: str) -> None:
        if not self.end.done():
            self.end.set_result(why)


class KeeperWorld:
    """A keeper and the processes that it has started; also what it tells the operator and the manager.

    Attributes:
        fails: What further processes fail with.
    """

    def __init__(self, number: int) -> None:
        self.children: list[PlayedChild] = []
        self.steps: list[str] = []
        self.warnings: list[str] = []
        self.ended: list[str] = []
        self.fails: PdServeError | None = None
        self.finishes_in_s = 1.0
        self.keeper = ApiServerKeeper(number, self._spawn, self, self.ended.append)

    async def _spawn(self, name: str) -> ApiServerChild:
        child = PlayedChild(name, 100 + len(self.children), self.fails, self.finishes_in_s)
        self.children.append(child)
        return child

    def step(self, text: str) -> None:
        self.steps.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    @property
    def serving(self) -> list[int]:
        return sorted(child.pid for child in self.keeper.serving.values())


@asynccontextmanager
async def keeping(number: int) -> AsyncIterator[tuple[KeeperWorld, "asyncio.Task[None]"]]:
    """A keeper whose first API servers serve, and its task."""
    world = KeeperWorld(number)
    await world.keeper.start()
    await world.keeper.join(CLUSTER)
    task = asyncio.create_task(world.keeper.keep())
    await asyncio.sleep(0)
    yield world, task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await world.keeper.stop()
    assert all(child.end.done() for child in world.children)


@in_virtual_time
async def test_the_first_ones_start_together_and_join_the_cluster_when_it_is_there() -> None:
    loop = asyncio.get_running_loop()
    world = KeeperWorld(3)
    begin = loop.time()

    flags = await world.keeper.start()

    assert (flags.served_model_name, loop.time() - begin) == ("tiny", START_S)
    assert world.serving == []
    assert len({child.name for child in world.children}) == 3
    await world.keeper.join(CLUSTER)
    assert (world.serving, loop.time() - begin) == ([100, 101, 102], 2 * START_S)
    assert [child.joined for child in world.children] == [CLUSTER] * 3
    await world.keeper.stop()


@in_virtual_time
async def test_one_that_dies_is_replaced_at_once_by_one_of_another_name_and_the_others_go_on() -> None:
    async with keeping(2) as (world, _):
        await asyncio.sleep(EARLY_DEATH_S + 1)
        dead, other = world.children
        dead.kill()
        await asyncio.sleep(0.1)
        assert world.ended == [dead.name]
        assert world.warnings == [
            f"{dead.name} was killed by SIGKILL; its streams end, and another one starts"
        ]
        assert world.serving == [other.pid]
        await asyncio.sleep(2 * START_S)
        assert world.serving == [other.pid, 102]
        assert world.children[2].joined == CLUSTER
        assert world.children[2].name not in (dead.name, other.name)


@in_virtual_time
async def test_the_replacement_of_one_that_dies_early_waits_longer_up_to_a_bound() -> None:
    async with keeping(1) as (world, _):
        for pause_s in (START_BACKOFF_S, MAX_DEATH_PAUSE_S, MAX_DEATH_PAUSE_S):
            number = len(world.children)
            world.children[-1].kill()
            await asyncio.sleep(pause_s - 1)
            assert len(world.children) == number
            await asyncio.sleep(1.5 + 2 * START_S)
            assert len(world.serving) == 1


@in_virtual_time
async def test_a_replacement_that_does_not_start_is_told_with_its_reason_and_tried_again() -> None:
    async with keeping(2) as (world, task):
        await asyncio.sleep(EARLY_DEATH_S + 1)
        world.fails = PdServeError("out of memory")
        world.children[0].kill()
        await asyncio.sleep(300)
        assert world.warnings[1] == "an API server does not start: out of memory; the next one starts in 5 s"
        assert len(world.warnings) > MAX_FAILED_STARTS
        failed = world.children[2:-1]
        assert all(child.end.done() for child in failed), "none is left behind"
        assert set(world.ended) >= {child.name for child in failed}
        assert not task.done(), "the other one serves"
        world.fails = None
        await asyncio.sleep(300)
        assert len(world.serving) == 2


@in_virtual_time
async def test_it_is_an_error_when_no_api_server_starts_any_more() -> None:
    async with keeping(1) as (world, task):
        world.fails = PdServeError("out of memory")
        world.children[0].kill()
        with pytest.raises(PdServeError, match=r"^no API server starts any more: out of memory$"):
            await task
        assert len(world.children) == 1 + MAX_FAILED_STARTS


@in_virtual_time
async def test_an_error_of_the_first_start_is_raised_as_it_is() -> None:
    world = KeeperWorld(2)
    world.fails = InvalidRequestError("--max-model-len: must be positive")

    with pytest.raises(InvalidRequestError, match="--max-model-len"):
        await world.keeper.start()
    await world.keeper.stop()
    assert all(child.end.done() for child in world.children)


@in_virtual_time
async def test_one_that_hangs_is_killed_and_replaced() -> None:
    async with keeping(2) as (world, _):
        await asyncio.sleep(EARLY_DEATH_S + 1)
        world.keeper.end(world.children[0].name)
        world.keeper.end("api-of-another-time")
        await asyncio.sleep(3 * START_S)
        assert world.serving == [101, 102]


@in_virtual_time
async def test_the_stop_waits_for_all_of_them_together_and_kills_those_that_take_too_long() -> None:
    world = KeeperWorld(2)
    world.finishes_in_s = 2.0
    await world.keeper.start()
    begin = asyncio.get_running_loop().time()
    await world.keeper.stop()
    assert asyncio.get_running_loop().time() - begin == 2.0
    assert [child.end.result() for child in world.children] == ["has ended with exit code 0"] * 2

    world = KeeperWorld(2)
    world.finishes_in_s = 1_000.0
    await world.keeper.start()
    begin = asyncio.get_running_loop().time()
    await world.keeper.stop()
    assert asyncio.get_running_loop().time() - begin == API_SERVER_STOP_S
    assert [child.end.result() for child in world.children] == ["was killed by SIGKILL"] * 2


@in_virtual_time
async def test_a_stop_ends_a_start() -> None:
    world = KeeperWorld(2)
    starting = asyncio.create_task(world.keeper.start())
    await asyncio.sleep(START_S / 2)
    await world.keeper.stop()
    assert starting.cancelled()
    assert all(child.end.done() for child in world.children)


@in_virtual_time
async def test_nothing_is_started_any_more_after_the_stop() -> None:
    async with keeping(1) as (world, task):
        world.children[0].kill()
        await asyncio.sleep(0.1)
        task.cancel()
        await world.keeper.stop()
        await asyncio.sleep(100)
        assert len(world.children) == 1
