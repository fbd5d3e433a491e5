"""Messages that are lost, duplicated or held on the simulated network."""

import asyncio
from typing import Any

from pd_serve.simulation.config import NetworkSettings
from pd_serve.simulation.message_faults import DOUBLED_AFTER_S, MessageFaults
from pd_serve.simulation.simulated_network import SimulatedNetwork, SimulatedWire
from tests.virtual_time import in_virtual_time


class World:
    """Node `a` sends to node `b`; numbers and texts are two types of messages."""

    def __init__(self) -> None:
        network = SimulatedNetwork(NetworkSettings(message_latency_s=0.001), 1.0)
        self.faults = network.faults = MessageFaults()
        self.received: list[Any] = []
        self._sender = SimulatedWire("a", network)
        receiver = SimulatedWire("b", network)
        address = receiver.listen_for_frames(lambda frames: self.received.append(frames[1]))
        self._sender.connect("b", address)

    async def send(self, *messages: object) -> list[Any]:
        """Everything that arrives soon."""
        self.received.clear()
        for message in messages:
            self._sender.send("b", message)
        await asyncio.sleep(DOUBLED_AFTER_S / 2)
        return self.received


@in_virtual_time
async def test_the_next_messages_of_a_type_are_lost() -> None:
    world = World()
    world.faults.lose(int, times=2)

    assert await world.send(1, "one", 2, 3) == ["one", 3]


@in_virtual_time
async def test_a_duplicated_message_arrives_a_second_time_later() -> None:
    world = World()
    world.faults.double(int)

    assert await world.send(1, "one") == [1, "one"]
    await asyncio.sleep(DOUBLED_AFTER_S)
    assert world.received == [1, "one", 1]


@in_virtual_time
async def test_messages_after_a_held_one_wait_with_it_and_keep_their_order() -> None:
    world = World()
    world.faults.hold(str)

    assert await world.send(1, "one", 2) == [1]
    world.faults.release()
    assert await world.send(3) == ["one", 2, 3]


@in_virtual_time
async def test_an_isolated_node_receives_nothing_until_all_is_healed() -> None:
    world = World()
    world.faults.isolate("b")
    world.faults.is_lost = lambda: True

    assert await world.send(1) == []
    world.faults.heal()
    assert await world.send(2) == [2]


@in_virtual_time
async def test_random_faults_lose_double_and_delay_messages_until_all_is_healed() -> None:
    world = World()
    lost, doubled, delays = iter([True, False, False]), iter([True, False]), iter([0.01, 0.0])
    world.faults.is_lost = lambda: next(lost)
    world.faults.is_doubled = lambda: next(doubled)
    world.faults.delay_s = lambda: next(delays)

    assert await world.send("lost", "late and twice", "in time") == ["in time", "late and twice"]
    await asyncio.sleep(DOUBLED_AFTER_S)
    assert world.received == ["in time", "late and twice", "late and twice"]
    world.faults.heal()
    assert await world.send(1, 2) == [1, 2]
