"""Requests whose API server dies, and which another API server adopts: whole clusters in virtual time."""

import asyncio
import functools
import inspect
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from migration.messages import Committed, Final, InstanceId, Offer, RequestId
from migration.record import MigrationRecord
from pd_serve.comm.messages import Heartbeat
from pd_serve.comm.outputs import OutputBatch
from pd_serve.comm.requests import Call, MoveRequest
from pd_serve.comm.rpc import Answer
from pd_serve.comm.timing import API_SERVER_LEASE_S
from pd_serve.frontend.frontend import Frontend
from pd_serve.simulated_engine.contents import SegmentPrompt, expected_output
from pd_serve.simulated_engine.outputs import SimulatedCodec, SimulatedPayload
from pd_serve.simulated_engine.settings import SEGMENT_TOKENS
from pd_serve.simulation.message_faults import MessageFaults
from pd_serve.simulation.simulated_cluster import SimulatedCluster
from pd_serve.simulation.simulated_network import SimulatedWire
from router.dispatcher import Dispatcher
from router.policies import policy_set
from router.request import NewRequest
from tests.unit.pd_serve.simulation.test_simulate import ENGINE, config
from tests.virtual_time import in_virtual_time

#: Of the only prompt: its tokens take 7 s.
PROMPT, OUTPUT, SEED = 200, 300, 7
STEM = "chatcmpl-mine.digest"


class Reader:
    """An API server and what it has delivered, by request."""

    def __init__(self, cluster: SimulatedCluster, name: str) -> None:
        self.name = name
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, object] = {}
        self.resumed: dict[str, bool] = {}
        self._cluster = cluster
        loop = asyncio.get_running_loop()
        self.frontend = Frontend(
            SimulatedWire(name, cluster.network),
            cluster._find_manager,
            SimulatedCodec(),
            self._deliver,
            Dispatcher(policy_set("llumnix"), random.Random(0), loop.time),
            num_slots=8,
            orphan_s=cluster.config.orphan_s,
            clock=loop.time,
        )

    def _deliver(self, batch: OutputBatch) -> None:
        for output in batch.outputs:
            self.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
            if output.finish_reason is not None:
                self.ends[output.request_id] = output.finish_reason

    async def submit(self, end: str = "", stem: str = STEM, output: int = OUTPUT) -> RequestId:
        """Returns the id of the request."""
        request_id = f"{stem}-{end or self.name}"
        payload = SimulatedPayload(request_id, PROMPT, output, 0, 0.0, (), SEED)
        adoption = self.frontend.adoption
        self.resumed[request_id] = await adoption.submit(request_id, payload.encode(), NewRequest(PROMPT))
        return RequestId(request_id)

    async def until(self, request_id: str, number: int) -> None:
        """Returns when this number of tokens has been delivered."""
        while len(self.tokens.get(request_id, ())) < number:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def whole(self, request_id: str, output: int = OUTPUT) -> None:
        """Waits for the end of a request. All its tokens came once, in order."""
        async with asyncio.timeout(120.0):
            while request_id not in self.ends:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        prompt = SegmentPrompt(PROMPT, (), SEGMENT_TOKENS, SEED)
        assert self.tokens[request_id] == expected_output(prompt, output, ENGINE.block_tokens)
        assert self.ends[request_id] == "length"

    async def die(self) -> None:
        self._cluster.network.cut(self.name)
        await self.frontend.close()


class World:
    """A cluster with the API servers a, b and c. At the end nothing is left of any request."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self.cluster = cluster
        self.readers = self.a, self.b, self.c = [Reader(cluster, name) for name in "abc"]

    @property
    def faults(self) -> MessageFaults:
        if self.cluster.network.faults is None:
            self.cluster.network.faults = MessageFaults()
        return self.cluster.network.faults

    async def orphan(self, tokens: int = 50, output: int = OUTPUT) -> RequestId:
        """A request of `a`, which dies when it has delivered this number of tokens."""
        request_id = await self.a.submit(output=output)
        await self.a.until(request_id, tokens)
        await self.a.die()
        return request_id

    def move(self, request_id: str, source: str, destination: str) -> "asyncio.Future[MigrationRecord]":
        moves = self.cluster.launcher.instances[source].llumlet._moves
        request = MoveRequest(RequestId(request_id), InstanceId(destination))
        return asyncio.ensure_future(moves.move("test", request))

    def holders(self, request_id: str) -> list[str]:
        instances = self.cluster.launcher.instances.items()
        return [name for name, instance in instances if request_id in instance.engine.sequences]

    def adopted(self) -> int:
        return sum(i.llumlet._orphans.num_adopted for i in self.cluster.launcher.instances.values())

    def ended(self) -> int:
        return sum(i.llumlet._requests.num_orphans_ended for i in self.cluster.launcher.instances.values())


def in_world(
    orphan_s: float = 30.0,
) -> Callable[[Callable[..., Coroutine[Any, Any, None]]], Callable[..., None]]:
    """Makes a plain test of an async one, whose first parameter is a world of its own."""

    def decorate(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
        @in_virtual_time
        @functools.wraps(test)
        async def run(**arguments: Any) -> None:
            async with running_world(orphan_s) as made:
                await test(made, **arguments)

        signature = inspect.signature(test)
        run.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
        return run

    return decorate


@asynccontextmanager
async def running_world(orphan_s: float) -> AsyncIterator[World]:
    cluster = SimulatedCluster(config(requests=[], orphan_s=orphan_s, every_step=True), lambda batch: None)
    await cluster.start()
    made = World(cluster)
    try:
        for reader in made.readers:
            await reader.frontend.wait_for_instances()
        await asyncio.sleep(2.0)
        yield made
        async with asyncio.timeout(100.0):
            while cluster.num_leaked_blocks:  # noqa: ASYNC110
                await asyncio.sleep(0.5)
        assert await cluster.check_integrity() == []
    finally:
        for reader in made.readers:
            await reader.frontend.close()
        await cluster.stop()


@in_world()
async def test_a_request_goes_on_where_it_is_when_its_client_asks_another_api_server(world: World) -> None:
    first = await world.orphan()
    began = asyncio.get_running_loop().time()
    second = await world.b.submit()
    assert asyncio.get_running_loop().time() - began < 5.0
    assert world.b.resumed[second]
    await world.b.until(second, 1)
    # It went on meanwhile, and nothing of it is computed again.
    assert len(world.b.tokens[second]) > 100
    assert world.adopted() == 1
    assert world.holders(first) == []
    await world.b.whole(second)
    (timeline,) = world.b.frontend.requests.find(second)
    assert timeline["recomputes"] == 0


@in_world(orphan_s=5.0)
async def test_without_a_client_that_comes_back_it_ends_after_its_time(world: World) -> None:
    first = await world.orphan(10, output=1500)
    await asyncio.sleep(API_SERVER_LEASE_S + 2.0)
    assert len(world.holders(first)) == 1, "it goes on after its API server has left"
    await asyncio.sleep(6.0)
    assert world.holders(first) == []
    assert world.ended() == 1


@in_world(orphan_s=0.0)
async def test_with_0_seconds_it_ends_with_its_api_server(world: World) -> None:
    await world.orphan(10, output=1500)
    second = await world.b.submit(output=1500)
    assert not world.b.resumed[second]
    await world.b.whole(second, 1500)


@in_world()
async def test_a_request_that_ended_meanwhile_is_delivered_whole(world: World) -> None:
    first = await world.orphan(200)
    await asyncio.sleep(20.0)
    assert world.holders(first) == []
    second = await world.b.submit()
    assert world.b.resumed[second]
    await world.b.whole(second)
    assert world.adopted() == 1


@in_world()
async def test_a_request_of_another_stem_or_of_a_living_api_server_is_not_adopted(world: World) -> None:
    first = await world.a.submit()
    await world.a.until(first, 50)
    began = asyncio.get_running_loop().time()
    second = await world.b.submit()
    assert asyncio.get_running_loop().time() - began < 2.0, "the next heartbeat says that it lives"
    other = await world.b.submit(stem="chatcmpl-mine.other")
    assert not world.b.resumed[second]
    assert not world.b.resumed[other]
    await world.a.whole(first)
    await world.b.whole(second)
    await world.b.whole(other)
    assert world.adopted() == 0


@in_world()
async def test_a_new_request_waits_for_one_round_trip(world: World) -> None:
    began = asyncio.get_running_loop().time()
    request_id = await world.b.submit()
    assert asyncio.get_running_loop().time() - began < 0.01
    await world.b.whole(request_id)


@in_world()
async def test_of_two_api_servers_that_are_asked_one_adopts_it_and_both_serve_it(world: World) -> None:
    await world.orphan()
    second, third = await asyncio.gather(world.b.submit(), world.c.submit())
    assert sorted([world.b.resumed[second], world.c.resumed[third]]) == [False, True]
    await world.b.whole(second)
    await world.c.whole(third)
    assert world.adopted() == 1


@in_world()
async def test_an_api_server_that_comes_back_serves_its_stream_to_the_end_and_harms_no_other(
    world: World,
) -> None:
    first = await world.a.submit()
    await world.a.until(first, 50)
    world.faults.isolate("a")
    second = await world.b.submit()
    assert world.b.resumed[second]
    world.faults.heal()
    world.a.frontend.requests.abort([RequestId(second)])
    await world.a.whole(first)
    await world.b.whole(second)
    assert world.adopted() == 1


@in_world()
async def test_an_abort_by_the_former_api_server_does_not_end_it(world: World) -> None:
    first = await world.a.submit()
    await world.a.until(first, 50)
    world.faults.isolate("a")
    second = await world.b.submit()
    world.faults.heal()
    world.a.frontend.requests.abort([first])
    await world.b.whole(second)


@in_world()
async def test_an_instance_that_dies_right_after_the_adoption_loses_no_token(world: World) -> None:
    first = await world.orphan()
    (holder,) = world.holders(first)
    pending = asyncio.ensure_future(world.b.submit())
    while not world.adopted():  # noqa: ASYNC110
        await asyncio.sleep(0.0001)
    await world.cluster.kill_instance(holder)
    second = await pending
    await world.b.whole(second)


@pytest.mark.parametrize("held", [Offer, Final, Committed])
@in_world()
async def test_a_request_is_adopted_in_the_middle_of_a_migration(world: World, held: type) -> None:
    first = await world.orphan()
    (holder,) = world.holders(first)
    (other,) = {"decode-0", "decode-1"} - {holder}
    await asyncio.sleep(2.5)
    world.faults.hold(held)
    moving = world.move(first, holder, other)
    await asyncio.sleep(0.3)
    second = await world.b.submit()
    assert world.b.resumed[second]
    world.faults.release()
    await asyncio.gather(moving, return_exceptions=True)
    await world.b.whole(second)


@pytest.mark.parametrize("lost", [Call, Answer])
@in_world()
async def test_lost_messages_delay_a_stream_only(world: World, lost: type) -> None:
    await world.orphan()
    await asyncio.sleep(4.0)
    world.faults.lose(lost, times=2)
    second = await world.b.submit()
    await world.b.whole(second)


@in_world()
async def test_a_request_that_is_adopted_moves_on_like_any_other(world: World) -> None:
    """Its prefill instance had been told to hand it off under its former id."""
    await world.a.submit()
    await asyncio.sleep(0.001)
    await world.a.die()
    second = await world.b.submit()
    await world.b.whole(second)


@in_world()
async def test_several_requests_are_adopted_each_by_its_own_stem(world: World) -> None:
    stems = [f"{child}_cmpl-mine.digest" for child in range(3)]
    first = [await world.a.submit(stem=stem) for stem in stems]
    await world.a.until(first[-1], 50)
    await world.a.die()
    second = await asyncio.gather(*(world.b.submit(stem=stem) for stem in stems))
    for request_id in second:
        assert world.b.resumed[request_id]
        await world.b.whole(request_id)
    assert world.adopted() == 3


@in_world()
async def test_a_client_that_comes_back_twice_is_served_by_a_third_api_server(world: World) -> None:
    await world.orphan()
    second = await world.b.submit()
    await world.b.until(second, 150)
    await world.b.die()
    third = await world.c.submit()
    assert world.c.resumed[third]
    await world.c.whole(third)
    assert world.adopted() == 2


@in_world()
async def test_of_two_requests_to_one_api_server_one_goes_on_and_both_are_served(world: World) -> None:
    await world.orphan()
    second, third = await asyncio.gather(world.b.submit("b1"), world.b.submit("b2"))
    assert sorted([world.b.resumed[second], world.b.resumed[third]]) == [False, True]
    await world.b.whole(second)
    await world.b.whole(third)
    assert world.adopted() == 1


@in_world()
async def test_long_steps_do_not_make_an_api_server_look_alive(world: World) -> None:
    """The first answer comes without a heartbeat, as the engine is busy, and the next one has one."""
    first = await world.orphan()
    (holder,) = world.holders(first)
    faults = world.cluster.launcher.instances[holder].faults
    faults.delays_s["clients_of"] = 1.0
    asking = asyncio.ensure_future(world.b.submit())
    await asyncio.sleep(0.6)
    faults.delays_s.clear()
    second = await asking
    assert world.b.resumed[second]
    await world.b.whole(second)


@in_world()
async def test_a_heartbeat_on_its_way_does_not_make_a_dead_api_server_look_alive(world: World) -> None:
    first = await world.a.submit()
    await world.a.until(first, 50)
    world.faults.hold(Heartbeat)
    await asyncio.sleep(1.0)
    asking = asyncio.ensure_future(world.b.submit())
    await asyncio.sleep(0.1)
    world.faults.release()
    await asyncio.sleep(0.05)
    await world.a.die()
    second = await asking
    assert world.b.resumed[second]
    await world.b.whole(second)


@in_world()
async def test_a_request_that_is_preempted_meanwhile_goes_on(world: World) -> None:
    first = await world.orphan()
    await asyncio.sleep(2.9)
    (holder,) = world.holders(first)
    adopting = asyncio.ensure_future(world.b.submit())
    while not adopting.done():
        world.cluster.launcher.instances[holder].engine.preempt(first)
        await asyncio.sleep(0.05)
    second = await adopting
    assert world.b.resumed[second]
    await world.b.whole(second)
    assert world.adopted() == 1


@in_world()
async def test_a_request_whose_instance_dies_too_is_started_anew(world: World) -> None:
    first = await world.orphan()
    (holder,) = world.holders(first)
    await world.cluster.kill_instance(holder)
    second = await world.b.submit()
    assert not world.b.resumed[second]
    await world.b.whole(second)


@in_world()
async def test_a_request_that_moves_between_the_search_and_the_call_is_found_again(world: World) -> None:
    first = await world.orphan()
    (holder,) = world.holders(first)
    (other,) = {"decode-0", "decode-1"} - {holder}
    await asyncio.sleep(4.0)
    faults = world.cluster.launcher.instances[holder].faults
    faults.delays_s["adopt"] = 1.0
    adopting = asyncio.ensure_future(world.b.submit())
    await asyncio.sleep(0.05)
    record = await world.move(first, holder, other)
    assert record.committed
    second = await adopting
    assert world.b.resumed[second]
    await world.b.whole(second)
    (timeline,) = world.b.frontend.requests.find(second)
    assert timeline["recomputes"] == 0


@pytest.mark.parametrize("held", [Offer, Final, Committed])
@in_world(orphan_s=5.0)
async def test_the_time_of_a_request_runs_out_in_the_middle_of_a_migration(world: World, held: type) -> None:
    """Nothing is left of it on either instance."""
    first = await world.orphan(10, output=1500)
    await asyncio.sleep(API_SERVER_LEASE_S + 3.0)
    (holder,) = world.holders(first)
    (other,) = {"decode-0", "decode-1"} - {holder}
    world.faults.hold(held)
    moving = world.move(first, holder, other)
    await asyncio.sleep(4.0)
    world.faults.release()
    await asyncio.gather(moving, return_exceptions=True)
    await asyncio.sleep(5.0)
    assert world.holders(first) == []
    second = await world.b.submit(output=1500)
    assert not world.b.resumed[second]
    await world.b.whole(second, 1500)


@pytest.mark.parametrize("seed", range(8))
@in_world()
async def test_whatever_happens_every_client_gets_its_whole_stream(world: World, seed: int) -> None:
    """Clients that come back at any time, moves, deaths of instances, and lost messages."""
    dice = random.Random(seed)
    first = await world.a.submit(output=400)
    await world.a.until(first, dice.randrange(1, 200))
    world.faults.is_lost = lambda: dice.random() < 0.002

    async def disturb() -> None:
        while True:
            await asyncio.sleep(dice.expovariate(1.0))
            instances = world.cluster.launcher.instances
            name = dice.choice(sorted(instances))
            what = dice.randrange(8)
            if what == 0 and len(instances) > 2:
                await world.cluster.kill_instance(name)
            elif what == 1:
                instances[name].faults.hang_s = dice.uniform(0.1, 2.0)
            elif ids := sorted(instances[name].engine.sequences):
                other = dice.choice(sorted(set(instances) - {name}) or [name])
                moving.append(world.move(dice.choice(ids), name, other))

    moving: list[asyncio.Future[MigrationRecord]] = []
    disturbing = asyncio.ensure_future(disturb())
    readers, served = world.readers, [(world.a, first)]
    for reader in readers[1:]:
        dead, request_id = served.pop()
        if dice.random() < 0.3:
            world.faults.isolate(dead.name)  # it lives, and its client has given it up
        else:
            await dead.die()
        await asyncio.sleep(dice.choice([0.0, dice.uniform(0.0, 5.0), dice.uniform(0.0, 40.0)]))
        again = await reader.submit(output=400)
        served.append((reader, again))
        if dice.random() < 0.3:
            served.append((reader, await reader.submit(f"{reader.name}-too", output=400)))
        await asyncio.sleep(dice.uniform(0.0, 5.0))
    disturbing.cancel()
    world.faults.heal()
    for reader, request_id in served:
        if reader is readers[2]:
            await reader.whole(request_id, 400)
    for reader in readers[:2]:
        reader.frontend.requests.abort(list(reader.frontend.requests.requests))
    for move in moving:
        move.cancel()  # those of a dead instance never end


@in_world()
async def test_a_doubled_call_adopts_once(world: World) -> None:
    await world.orphan()
    await asyncio.sleep(4.0)
    world.faults.double(Call)
    second = await world.b.submit()
    assert world.b.resumed[second]
    await world.b.whole(second)
    assert world.adopted() == 1


@in_world()
async def test_an_api_server_that_dies_while_it_adopts_leaves_an_orphan_again(world: World) -> None:
    await world.orphan()
    await asyncio.sleep(4.0)
    world.faults.hold(Answer)
    adopting = asyncio.ensure_future(world.b.submit())
    await asyncio.sleep(0.2)
    world.faults.release()
    while not world.adopted():  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await world.b.die()
    adopting.cancel()
    third = await world.c.submit()
    assert world.c.resumed[third]
    await world.c.whole(third)
    assert world.adopted() == 2


@in_world(orphan_s=5.0)
async def test_an_instance_that_hangs_while_it_is_asked_delays_a_request_only(world: World) -> None:
    """Its client gets a new one, and the orphan ends after its time."""
    first = await world.orphan(output=1500)
    (holder,) = world.holders(first)
    await asyncio.sleep(4.0)
    world.cluster.launcher.instances[holder].faults.hang_s = 8.0
    began = asyncio.get_running_loop().time()
    second = await world.b.submit(output=1500)
    assert asyncio.get_running_loop().time() - began < 6.0
    await world.b.whole(second, 1500)
    await asyncio.sleep(API_SERVER_LEASE_S + 10.0)
    assert world.holders(first) == []
