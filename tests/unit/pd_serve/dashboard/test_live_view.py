"""Events of the live page, and instances that are asked only while a page is open."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from migration.engine_interface import HeldBlocks
from migration.errors import Refusal, RefusalCode
from migration.messages import InstanceId, RequestId
from pd_serve.comm.membership import InstanceInfo
from pd_serve.comm.requests import Holdings, ListHoldings
from pd_serve.dashboard import live_view
from pd_serve.dashboard.live_view import MAX_MOVES, MAX_WATCHERS, LiveView
from pd_serve.dashboard.recent import RecentEvents
from pd_serve.errors import EngineDeadError
from tests.members import instance_info
from tests.unit.pd_serve.made_migrations import migrated


class FakeInstances:
    """Answers calls.

    Attributes:
        asked: Instances that were asked, in order.
        held: Request, blocks and whether they are reserved, by instance.
        silent: Instances that do not answer; `dead` ones raise an error.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.held: dict[str, list[tuple[str, int, bool]]] = {"decode-0": [], "decode-1": []}
        self.leaving: dict[str, list[tuple[str, str, str]]] = {}
        self.silent: set[str] = set()
        self.dead: set[str] = set()

    def __iter__(self) -> Iterator[InstanceInfo]:
        for name in self.held:
            yield instance_info(name)

    async def call(self, instance_id: str, request: ListHoldings) -> Holdings:
        self.asked.append(instance_id)
        if instance_id in self.silent:
            await asyncio.Event().wait()
        if instance_id in self.dead:
            raise EngineDeadError("it has died")
        held = [HeldBlocks(RequestId(r), blocks, comes) for r, blocks, comes in self.held[instance_id]]
        leaving = [(RequestId(r), InstanceId(to), why) for r, to, why in self.leaving.get(instance_id, [])]
        return Holdings(held, leaving)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_view, "INTERVAL_S", 0.01)
    monkeypatch.setattr(live_view, "PATIENCE_S", 0.05)


@pytest.fixture
def instances() -> FakeInstances:
    return FakeInstances()


@pytest.fixture
def recent() -> RecentEvents:
    return RecentEvents()


@pytest.fixture
async def view(instances: FakeInstances, recent: RecentEvents) -> AsyncIterator[LiveView]:
    view = LiveView("api-1", lambda: {"instances": [{"freeness": float("inf")}]}, instances, recent)
    yield view
    await view.close()


async def following(events: AsyncIterator[bytes]) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(await anext(events))
    return event


def moved(recent: RecentEvents, request: str, *, committed: bool = True) -> None:
    refusal = None if committed else Refusal(RefusalCode.NO_FREE_BLOCKS, "no 3 free KV blocks")
    record = migrated(request, "decode-0", "decode-1", "balance", refusal, blocks=3, duration_s=0.25)
    recent.migration_ended(record)


async def test_an_event_has_the_blocks_of_every_request(view: LiveView, instances: FakeInstances) -> None:
    instances.held = {"decode-0": [("a", 5, False), ("b", 2, False)], "decode-1": [("b", 3, True)]}
    instances.leaving = {"decode-0": [("b", "decode-1", "balance")]}
    event = await following(view.events())

    a, b = (next(int(key) for key, name in event["names"].items() if name == wanted) for wanted in "ab")
    assert event["blocks"] == {"decode-0": [[a, 5, 0], [b, 2, 0]], "decode-1": [[b, 3, 1]]}
    assert event["leaving"] == [[b, "decode-0", "decode-1", "balance"]]
    assert (event["server"], event["block_tokens"]) == ("api-1", 16)
    assert event["cluster"] == {"instances": [{"freeness": None}]}, "JSON has no infinity"


async def test_each_page_gets_the_name_of_a_request_once(
    view: LiveView, instances: FakeInstances, recent: RecentEvents
) -> None:
    instances.held["decode-0"] = [("a", 5, False)]
    events = view.events()
    first = await following(events)
    instances.held["decode-0"] += [("b", 1, False)]
    second = await following(events)
    third = await following(events)

    assert list(first["names"].values()) == ["a"]
    assert list(second["names"].values()) == ["b"]
    assert third["names"] == {}
    assert third["blocks"]["decode-0"] == second["blocks"]["decode-0"] != first["blocks"]["decode-0"]
    other = await following(view.events())
    assert sorted(other["names"].values()) == ["a", "b"]


async def test_each_page_gets_each_migration_once(view: LiveView, recent: RecentEvents) -> None:
    moved(recent, "before")
    one, two = view.events(), view.events()
    assert (await following(one))["moves"] == (await following(two))["moves"] == []
    moved(recent, "a")
    moved(recent, "b", committed=False)

    for events in (one, two):
        event = await following(events)
        names = [event["names"][str(move["request"])] for move in event["moves"]]
        assert names == ["a", "b"]
        assert [(move["committed"], move["why"]) for move in event["moves"]] == [
            (True, ""),
            (False, "no 3 free KV blocks"),
        ]
        assert event["moves"][0] | {"request": 0, "seconds_ago": 0} == {
            "request": 0,
            "source": "decode-0",
            "destination": "decode-1",
            "reason": "balance",
            "committed": True,
            "why": "",
            "blocks": 3,
            "duration_s": 0.25,
            "seconds_ago": 0,
        }
        assert (await following(events))["moves"] == []


async def test_an_event_has_a_bounded_number_of_migrations(view: LiveView, recent: RecentEvents) -> None:
    events = view.events()
    await following(events)
    for number in range(MAX_MOVES + 7):
        moved(recent, f"r{number}")
    event = await following(events)

    assert (len(event["moves"]), event["moves_left_out"]) == (MAX_MOVES, 7)


async def test_instances_are_not_asked_without_an_open_page(view: LiveView, instances: FakeInstances) -> None:
    await asyncio.sleep(0.05)
    assert instances.asked == []
    events = view.events()
    await following(events)
    await following(events)
    assert (view.num_watchers, set(instances.asked)) == (1, {"decode-0", "decode-1"})

    await events.aclose()  # type: ignore[attr-defined]

    asked = len(instances.asked)
    await asyncio.sleep(0.1)
    assert (view.num_watchers, len(instances.asked)) == (0, asked)


async def test_two_pages_ask_instances_as_often_as_one(
    view: LiveView, instances: FakeInstances, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_view, "INTERVAL_S", 60.0)
    await following(view.events())
    await following(view.events())

    assert sorted(instances.asked) == ["decode-0", "decode-1"]


async def test_an_instance_that_does_not_answer_delays_no_event(
    view: LiveView, instances: FakeInstances
) -> None:
    instances.silent = {"decode-0"}
    instances.held["decode-1"] = [("a", 5, False)]
    events = view.events()
    for _ in range(3):
        event = await following(events)

    assert list(event["blocks"]) == ["decode-1"]
    assert instances.asked.count("decode-0") == 1, "it is not asked again before it has answered"


async def test_an_event_has_no_blocks_of_lost_instances(view: LiveView, instances: FakeInstances) -> None:
    instances.held = {name: [("a", 5, False)] for name in ("decode-0", "decode-1", "decode-2")}
    events = view.events()
    assert len((await following(events))["blocks"]) == 3
    instances.dead = {"decode-0"}
    del instances.held["decode-1"]

    assert list((await following(events))["blocks"]) == ["decode-2"]


async def test_numbers_of_ended_requests_are_forgotten(view: LiveView, instances: FakeInstances) -> None:
    events = view.events()
    for number in range(50):
        instances.held["decode-0"] = [(f"r{number}", 1, False)]
        await following(events)

    assert len(view._numbers.since(0)) <= 2


async def test_streams_end_with_the_server_and_are_bounded(view: LiveView) -> None:
    ends = False
    events = [view.events(lambda: ends) for _ in range(MAX_WATCHERS)]
    for each in events:
        await following(each)
    assert view.is_full
    ends = True
    for each in events:
        with pytest.raises(StopAsyncIteration):
            await anext(each)
    assert not view.is_full


async def test_a_page_gets_the_past_when_it_is_opened(instances: FakeInstances, recent: RecentEvents) -> None:
    """Hand-offs and one other migration, and the number of requests before there was a page."""
    moved(recent, "balanced")
    for number in range(404):
        recent.migration_ended(migrated(f"h{number}", "prefill-0", "decode-1", "handoff"))
    labels = {"service": "chat", "model_name": "tiny"}
    view = LiveView("api-1", dict, instances, recent, labels, lambda: (7, 2))
    view.open()
    await asyncio.sleep(0.01)
    events = view.events()

    first, second = await following(events), await following(events)

    reasons = Counter(move["reason"] for move in first["past_moves"])
    assert reasons == {"handoff": MAX_MOVES - 1, "balance": 1}
    assert first["names"][str(first["past_moves"][-1]["request"])] == "h403"
    assert [load[1:] for load in first["loads"]] == [[7, 2]]
    assert first["moves"] == []
    assert (first["service"], first["model"]) == ("chat", "tiny")
    assert "past_moves" not in second
    await view.close()


async def test_hand_offs_are_left_out_of_an_event_before_other_migrations(
    view: LiveView, recent: RecentEvents
) -> None:
    events = view.events()
    await following(events)
    moved(recent, "balanced")
    for number in range(2 * MAX_MOVES):
        recent.migration_ended(migrated(f"h{number}", "prefill-0", "decode-1", "handoff"))

    event = await following(events)

    assert (event["moves"][0]["reason"], len(event["moves"])) == ("balance", MAX_MOVES)
    assert event["moves_left_out"] == MAX_MOVES + 1


async def test_what_other_api_servers_have_counted_is_read_before_each_event(
    instances: FakeInstances, recent: RecentEvents
) -> None:
    other = RecentEvents(recent.clock)
    silent = asyncio.Event()
    number = 0

    async def update() -> None:
        nonlocal number
        number += 1
        other.token_gaps({0.05: 1})
        recent.note_elsewhere("b", other.counted(0))
        if number > 2:
            await silent.wait()

    view = LiveView("api-1", dict, instances, recent, update=update)
    events = view.events()

    tokens = []
    for _ in range(4):
        await following(events)
        tokens.append(sum(slot.tokens for slot in recent.slots()))

    assert tokens == [1, 2, 3, 3], "one that is silent does not stop the page, and is not asked twice"
    await events.aclose()  # type: ignore[attr-defined]
    await view.close()


def test_pages_at_other_api_servers_count(instances: FakeInstances, recent: RecentEvents) -> None:
    elsewhere = MAX_WATCHERS - 1
    view = LiveView("api-1", dict, instances, recent, pages_elsewhere=lambda: elsewhere)

    assert not view.is_full
    view.num_watchers = 1
    assert view.is_full
