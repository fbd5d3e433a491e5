"""Wires that are closed after the test."""

from collections.abc import AsyncIterator

import pytest

from pd_serve.comm.wire import CurveKeys, Wire
from tests.unit.pd_serve.comm.wire_world import KEYS, MakeWire


@pytest.fixture
async def make_wire() -> AsyncIterator[MakeWire]:
    wires: list[Wire] = []

    def make(name: str, keys: CurveKeys = KEYS) -> Wire:
        wires.append(Wire(name, "127.0.0.1", keys))
        return wires[-1]

    yield make
    for wire in wires:
        await wire.close()
