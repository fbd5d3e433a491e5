"""Frontends with four idle instances, and with none."""

from collections.abc import AsyncIterator

import pytest

from tests.unit.pd_serve.frontend.frontend_world import World


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Two prefill and two decode instances that are idle."""
    world = World()
    world.join("p0", "p1", "d0", "d1")
    yield world
    await world.frontend.close()


@pytest.fixture
async def empty() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.frontend.close()
