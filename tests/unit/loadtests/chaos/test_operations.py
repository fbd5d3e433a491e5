"""Operations during the faults."""

import asyncio
import random
from typing import Any

import pytest

from loadtests.answer import StreamError
from loadtests.chaos import operations
from loadtests.chaos.operations import Operator
from loadtests.chaos.schedule import Operation
from loadtests.stream_client import AsyncStreamClient
from tests.unit.loadtests.chaos.made_run import cluster, instance

CLUSTER = cluster(instance("prefill"), instance("decode"))


class RecordingClient(AsyncStreamClient):
    """Accepts or refuses all operations."""

    def __init__(self, refuses: bool = False) -> None:
        super().__init__("http://localhost")
        self.posted: list[tuple[str, dict[str, Any]]] = []
        self._refuses = refuses

    async def json(
        self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 0.0
    ) -> dict[str, Any]:
        self.posted.append((path, body or {}))
        if self._refuses:
            raise StreamError("HTTP 503")
        return {}


@pytest.fixture(autouse=True)
def _undone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "UNDO_S", 0.0)


async def posted(operation: Operation, seed: int = 0, refuses: bool = False) -> list[Any]:
    client = RecordingClient(refuses)
    operator = Operator(client, {"prefill": 1, "decode": 2})
    operator.begin(operation, CLUSTER, ["a", "b"], random.Random(seed))
    await asyncio.sleep(0.05)
    await operator.close()
    return client.posted


@pytest.mark.parametrize("refuses", [False, True])
async def test_a_change_of_size_is_undone_also_if_it_was_refused(refuses: bool) -> None:
    first, last = await posted(Operation.SCALE, refuses=refuses)

    assert first[0] == last[0] == "/cluster/scale"
    (role,) = first[1]
    assert abs(first[1][role] - last[1][role]) <= 1
    assert last[1][role] == {"prefill": 1, "decode": 2}[role]


async def test_no_pool_is_scaled_to_nothing() -> None:
    for seed in range(20):
        first, _ = await posted(Operation.SCALE, seed)
        assert all(size >= 1 for size in first[1].values())


async def test_a_drain_is_undone_and_what_it_has_stopped_is_started_again() -> None:
    for seed in range(20):
        first, (path, body) = await posted(Operation.DRAIN, seed)
        assert first[0] == "/cluster/drain"
        if first[1]["stop"]:
            role = first[1]["instance"].removesuffix("-0")
            assert (path, body) == ("/cluster/scale", {role: {"prefill": 1, "decode": 2}[role]})
        else:
            assert (path, body["draining"]) == ("/cluster/drain", False)


async def test_running_streams_are_moved_to_instances() -> None:
    calls = await posted(Operation.MOVE)

    assert {body["request_id"] for _, body in calls} == {"a", "b"}
    assert {body["destination"] for _, body in calls} <= {"prefill-0", "decode-0"}


async def test_a_rolling_restart_begins() -> None:
    assert await posted(Operation.RESTART) == [("/cluster/restart", {})]


async def test_without_instances_there_is_nothing_to_drain_or_move() -> None:
    operator = Operator(RecordingClient(), {})

    assert operator.begin(Operation.DRAIN, {}, [], random.Random(0)).startswith("nothing")
    assert operator.begin(Operation.MOVE, CLUSTER, [], random.Random(0)).startswith("nothing")


async def test_the_beginning_is_restored() -> None:
    client = RecordingClient()
    state = cluster(instance("prefill", draining=True), instance("decode"))

    await Operator(client, {"prefill": 1, "decode": 2}).restore(state)

    assert client.posted == [
        ("/cluster/scale", {"prefill": 1, "decode": 2}),
        ("/cluster/drain", {"instance": "prefill-0", "draining": False}),
    ]
