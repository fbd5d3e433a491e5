"""Links with latency, shared by the copies on them."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from migration.transport.kv_transport import KvRegion
from pd_serve.errors import PeerLostError
from pd_serve.simulated_engine.block_pool import BlockPool
from pd_serve.simulation.config import NetworkSettings
from pd_serve.simulation.simulated_network import SimulatedNetwork, SimulatedWire
from tests.virtual_time import in_virtual_time

SETTINGS = NetworkSettings(message_latency_s=0.001, kv_latency_s=0.01, kv_bytes_per_s=1000.0)

#: A block's number takes 8 bytes, and stands for 100.
SCALE = 12.5


def network() -> SimulatedNetwork:
    return SimulatedNetwork(SETTINGS, SCALE)


def now() -> float:
    return asyncio.get_running_loop().time()


class Node:
    """A wire that notes what arrives when, and ten blocks."""

    def __init__(self, name: str, net: SimulatedNetwork) -> None:
        self.wire = SimulatedWire(name, net)
        self.address = self.wire.listen_for_frames(self._hear)
        self.heard: list[tuple[float, list[Any]]] = []
        self.pool = BlockPool(10)
        self.transport = net.fabric.transport(name)
        address, count = self.pool.content.buffer_info()
        self.transport.register([KvRegion(address, count, 8)])

    def _hear(self, frames: list[Any]) -> None:
        self.heard.append((now(), frames))

    async def read(self, peer: "Node", blocks: list[int]) -> float:
        """Copies blocks to the same places here; returns when it was done."""
        await self.transport.read(peer.wire.name, peer.transport.endpoint(), blocks, blocks)
        return now()


@in_virtual_time
async def test_messages_take_the_latency_and_stay_in_order() -> None:
    net = network()
    a, b = Node("a", net), Node("b", net)
    a.wire.connect("b", b.address)

    assert a.wire.send("b", "first", [b"payload"])
    assert a.wire.send("b", "second")
    assert not a.wire.send("nobody", "third")
    await asyncio.sleep(1)

    assert b.heard == [(0.001, ["a", "first", b"payload"]), (0.001, ["a", "second"])]


@in_virtual_time
async def test_messages_from_and_to_a_node_that_is_cut_off_are_lost() -> None:
    net = network()
    a, b = Node("a", net), Node("b", net)
    a.wire.connect("b", b.address)
    b.wire.connect("a", a.address)

    a.wire.send("b", "on its way")
    net.cut("b")
    b.wire.send("a", "never")
    await asyncio.sleep(1)
    assert (a.heard, b.heard) == ([], [])

    net.restore("b")
    a.wire.send("b", "again")
    await asyncio.sleep(1)
    assert [frames[1] for _, frames in b.heard] == ["again"]


@in_virtual_time
async def test_a_copy_takes_the_time_of_its_kv_bytes() -> None:
    net = network()
    a, b = Node("a", net), Node("b", net)
    for block in range(10):
        a.pool.content[block] = block

    done = await b.read(a, [1, 2, 3])

    assert done == pytest.approx(0.01 + 0.3)
    assert list(b.pool.content[1:4]) == [1, 2, 3]
    assert b.pool.content[0] != 0


@in_virtual_time
async def test_copies_share_the_links_that_they_have_in_common() -> None:
    """Two copies out of `a` take twice as long each; one between others does not notice."""
    net = network()
    a, b, c, d, e = (Node(name, net) for name in "abcde")

    done = await asyncio.gather(b.read(a, [1, 2]), c.read(a, [1, 2]), e.read(d, [1, 2]))

    assert done == pytest.approx([0.41, 0.41, 0.21])
    assert sum(net.fabric.leaving.values()) + sum(net.fabric.entering.values()) == 0


@in_virtual_time
async def test_a_message_waits_for_its_share_of_a_busy_link() -> None:
    net = network()
    a, b, c = (Node(name, net) for name in "abc")
    a.wire.connect("c", c.address)

    copy = asyncio.ensure_future(b.read(a, [1, 2, 3]))
    await asyncio.sleep(0.05)
    a.wire.send("c", "hello")
    await copy
    await asyncio.sleep(1)

    assert c.heard[0][0] > 0.05 + 0.001


@in_virtual_time
async def test_a_copy_from_a_node_that_is_cut_off_fails() -> None:
    net = network()
    a, b = Node("a", net), Node("b", net)
    copy = asyncio.ensure_future(b.read(a, [1, 2, 3]))
    await asyncio.sleep(0.05)

    net.cut("a")

    with pytest.raises(PeerLostError):
        await copy
    assert net.fabric.leaving["a"] == net.fabric.entering["b"] == 0


@in_virtual_time
async def test_a_copy_between_two_machines_has_another_bandwidth() -> None:
    settings = replace(SETTINGS, nodes=2, far_kv_bytes_per_s=SETTINGS.kv_bytes_per_s / 10)
    net = SimulatedNetwork(settings, SCALE)
    here, near, far = (Node(name, net) for name in ("p-0", "d-2", "d-1"))

    assert await near.read(here, [1, 2, 3]) == pytest.approx(0.01 + 0.3)
    began = now()
    assert await far.read(here, [1, 2, 3]) == pytest.approx(began + 0.01 + 3.0)
