"""Messages on links that are cut, slow or lossy."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

from pd_serve.comm.membership import Join
from pd_serve.comm.messages import AbortRequests, Heartbeat, TokenHeader
from pd_serve.simulated_engine.outputs import SimulatedBatch, SimulatedOutput
from pd_serve.simulation.config import NetworkSettings
from pd_serve.simulation.faults.links import DUPLICATE_AFTER_S, EncodedOutputs, FaultyNetwork, FaultyWire
from pd_serve.simulation.faults.process_loop import ProcessLoop


class World:
    """Processes a and b; b takes two types of messages."""

    def __init__(self, loop: ProcessLoop) -> None:
        self.network = FaultyNetwork(loop, random.Random(0), NetworkSettings(), 1.0)
        self.a, self.b = loop.spawn("a"), loop.spawn("b")
        self.received: list[Any] = []
        self.wire: FaultyWire = self.a.run(FaultyWire, "a", self.network)
        self.address = self.b.run(self._listen)
        self.wire.connect("b", self.address)

    def _listen(self) -> str:
        wire = self.listener = FaultyWire("b", self.network)
        return wire.listen(Heartbeat | AbortRequests, self._on_message)

    def _on_message(self, sender: str, message: Any, payload: Any) -> None:
        self.received += message.request_ids if isinstance(message, AbortRequests) else [message]

    def send(self, *numbers: str) -> None:
        for number in numbers:
            self.wire.send("b", AbortRequests([number]))  # type: ignore[list-item]


def in_world(test: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        await test(World(loop))

    loop = ProcessLoop()
    loop.run_until_complete(run())
    loop.drop()


def test_messages_of_one_connection_keep_their_order() -> None:
    async def test(world: World) -> None:
        numbers = [str(n) for n in range(50)]
        world.send(*numbers)
        await asyncio.sleep(1.0)
        assert world.received == numbers

    in_world(test)


def test_messages_wait_for_the_end_of_all_partitions() -> None:
    async def test(world: World) -> None:
        link = world.network.link("a", "b")
        link.cuts += 2
        world.send("1", "2")
        world.network.heal("a", "b")
        await asyncio.sleep(1.0)
        assert world.received == []
        assert world.network.problems()
        world.network.heal("a", "b")
        world.send("3")
        await asyncio.sleep(1.0)
        assert world.received == ["1", "2", "3"]
        assert world.network.problems() == []

    in_world(test)


def test_a_reset_loses_what_waits() -> None:
    async def test(world: World) -> None:
        world.network.link("a", "b").cuts += 1
        world.send("1")
        world.network.heal("a", "b", reset=True)
        world.send("2")
        await asyncio.sleep(1.0)
        assert world.received == ["2"]

    in_world(test)


def test_a_lossy_link_loses_and_a_duplicating_one_doubles() -> None:
    async def test(world: World) -> None:
        link = world.network.link("a", "b")
        link.loss = 1.0
        world.send("1")
        link.loss, link.duplication = 0.0, 1.0
        world.send("2", "3")
        await asyncio.sleep(DUPLICATE_AFTER_S / 2)
        assert world.received == ["2", "3"]
        await asyncio.sleep(1.0)
        assert world.received == ["2", "3", "2", "3"]
        assert dict(world.network.dropped) == {"AbortRequests": 1}

    in_world(test)


def test_the_next_messages_of_a_type_are_lost_and_no_others() -> None:
    async def test(world: World) -> None:
        world.network.lost_next["AbortRequests"] = 2
        heartbeat = Heartbeat()
        world.send("1")
        world.wire.send("b", heartbeat)
        world.send("2", "3")
        await asyncio.sleep(1.0)
        assert world.received == [heartbeat, "3"]
        assert dict(world.network.dropped) == {"AbortRequests": 2}

    in_world(test)


def test_a_suspended_process_receives_later_and_a_dead_one_never() -> None:
    async def test(world: World) -> None:
        world.b.suspend()
        world.send("1")
        await asyncio.sleep(1.0)
        assert world.received == []
        world.b.resume()
        await asyncio.sleep(0.1)
        assert world.received == ["1"]
        world.b.kill()
        world.send("2")
        await asyncio.sleep(1.0)
        assert world.received == ["1"]
        assert not world.network.listens(world.address)

    in_world(test)


def test_what_cannot_be_handled_is_counted_as_in_production() -> None:
    async def test(world: World) -> None:
        def fail(sender: str, message: Any, payload: Any) -> None:
            raise ValueError("no")

        world.listener.listen(Heartbeat, fail)
        world.wire.connect("b", world.listener._bound[-1])
        world.wire.send("b", Heartbeat())
        await asyncio.sleep(1.0)
        assert len(world.listener.failures) == 1

    in_world(test)


def test_a_process_learns_no_object_of_another_one() -> None:
    async def test(world: World) -> None:
        message = AbortRequests(["1"])  # type: ignore[list-item]
        got: list[Any] = []
        address = world.listener.listen(
            AbortRequests | Join, lambda sender, m, payload: got.append((m, payload))
        )
        world.wire.connect("b", address)
        world.wire.send("b", message, [b"more"])
        await asyncio.sleep(1.0)
        assert got == [(message, [b"more"])]
        assert got[0][0] is not message

    in_world(test)


def test_tokens_are_encoded() -> None:
    async def test(world: World) -> None:
        frames: list[list[bytes]] = []
        address = world.listener.listen_for_frames(frames.append)
        output = SimulatedOutput("r", [1, 2], None, (0.5, 1.0))  # type: ignore[arg-type]
        world.wire.send_to(address, [TokenHeader("a", [(3, 4, 0)]), SimulatedBatch([output])])
        await asyncio.sleep(1.0)
        header, batch = EncodedOutputs().decode(frames[0])
        assert (header.instance_id, header.spans, batch.outputs) == ("a", [(3, 4, 0)], [output])

    in_world(test)


def test_reads_of_a_dead_instance_are_over() -> None:
    async def test(world: World) -> None:
        fabric = world.network.fabric
        fabric.begin_read("a", "b")
        fabric.begin_read("b", "a")
        fabric.die("b")
        assert fabric.reads == [("b", "a")]
        assert fabric.leaving["a"] == 0

    in_world(test)
