"""A request that ends its instances fails alone."""

import asyncio
from collections.abc import Callable

from vllm.v1.engine import FinishReason

from pd_serve.comm.messages import AddRequest
from pd_serve.comm.timing import FORGIVEN_S
from pd_serve.frontend.suspects import MAX_DEATHS, MAX_DEATHS_IN_A_ROW, PROGRESS_TOKENS
from tests.unit.pd_serve.frontend.frontend_world import World
from tests.virtual_time import in_virtual_time


class LivingWorld(World):
    """Its neutral instances generate a token of each request every 50 ms, and one request ends them.

    Args:
        start_s: Time until another instance has started in the place of one that has died.

    Attributes:
        deaths: Instances that have died.
    """

    def __init__(self, names: list[str], kills: Callable[[str, int], bool], start_s: float = 0.0) -> None:
        super().__init__()
        self.deaths: list[str] = []
        self._kills = kills
        self._start_s = start_s
        self._next = len(names)
        self._running: dict[str, dict[str, tuple[int, int]]] = {}  # epoch and index of the next token
        self._seen = 0
        for name in names:
            self.join(name)

    async def run(self, seconds: float) -> None:
        for _ in range(int(seconds / 0.05)):
            await asyncio.sleep(0.05)
            self._step()

    def replace(self, name: str) -> None:
        """An instance dies, and another one starts in its place."""
        self._running.pop(name, None)
        self.leave(name)
        asyncio.get_running_loop().call_later(self._start_s, self.join, f"n{self._next}")
        self._next += 1

    def _step(self) -> None:
        new, self._seen = self.wire.sent[self._seen :], len(self.wire.sent)
        for peer, add, _ in new:
            if isinstance(add, AddRequest) and peer in self.members:
                self._running.setdefault(peer, {})[add.request_id] = add.epoch, len(add.output_token_ids)
        for name in list(self.members):
            batch = self._running.get(name, {})
            if any(self._kills(request_id, index) for request_id, (_, index) in batch.items()):
                self.deaths.append(name)
                self.replace(name)
                continue
            for request_id, (epoch, index) in list(batch.items()):
                if request_id in self.requests.requests:
                    self.tokens(name, epoch, index, 10 + index, of=request_id)
                    batch[request_id] = epoch, index + 1
                else:
                    del batch[request_id]


async def outcome(world: LivingWorld, seconds: float = 60.0) -> list[str]:
    """The requests that have failed. All others have gone on."""
    for number in range(15):
        world.submit(f"r{number}")
    world.submit("poison")
    await world.run(seconds)
    failed = [o.request_id for o in world.delivered() if o.finish_reason == FinishReason.ERROR]
    tokens = {r: len(request.ledger.token_ids) for r, request in world.requests.requests.items()}
    assert len(tokens) + len(failed) >= 16
    assert all(number > 50 for number in tokens.values()), tokens
    await world.frontend.close()
    return failed


@in_virtual_time
async def test_a_request_that_ends_its_instance_at_once_fails_alone() -> None:
    for names in (["n0"], ["n0", "n1"], ["n0", "n1", "n2", "n3"]):
        world = LivingWorld(names, lambda request_id, index: request_id == "poison")
        assert await outcome(world) == ["poison"]
        assert len(world.deaths) <= MAX_DEATHS + 3


@in_virtual_time
async def test_the_time_without_an_instance_forgives_nothing() -> None:
    """A start waits up to two minutes after failed ones, longer than a death is remembered."""
    world = LivingWorld(["n0", "n1"], lambda request_id, index: request_id == "poison", FORGIVEN_S + 1.0)
    assert await outcome(world, 2.3 * FORGIVEN_S) == ["poison"]


@in_virtual_time
async def test_a_request_is_blamed_from_its_first_death_on_also_beside_others_that_have_seen_more() -> None:
    world = LivingWorld(["n0"], lambda request_id, index: request_id == "poison", 2.0)
    world.submit("unlucky")
    await world.run(0.2)
    for name in ("n0", "n1"):
        world.replace(name)
        await world.run(2.2)
    assert "poison" in await outcome(world)
    assert len(world.deaths) == MAX_DEATHS + 1


@in_virtual_time
async def test_a_request_that_ends_its_instance_at_a_token_fails_alone() -> None:
    world = LivingWorld(["n0", "n1"], lambda request_id, index: request_id == "poison" and index >= 20)
    assert await outcome(world) == ["poison"]


@in_virtual_time
async def test_a_request_that_ends_every_instance_after_some_tokens_fails_in_the_end() -> None:
    """It may end as many instances as it gets tokens for, but not more than a few."""
    began: dict[int, int] = {}

    def kills(request_id: str, index: int) -> bool:
        first = began.setdefault(len(world.deaths), index) if request_id == "poison" else index
        return request_id == "poison" and index >= first + PROGRESS_TOKENS + 4

    world = LivingWorld(["n0", "n1"], kills)
    assert await outcome(world, 120.0) == ["poison"]
    assert len(world.deaths) <= MAX_DEATHS_IN_A_ROW + 3


@in_virtual_time
async def test_a_request_that_goes_on_each_time_outlives_deaths_every_few_seconds() -> None:
    world = LivingWorld(["n0", "n1"], lambda request_id, index: False)
    world.submit()
    for number in range(MAX_DEATHS_IN_A_ROW - 1):
        await world.run(3.0)
        world.leave(world.requests.requests["r"].ledger.owner)  # type: ignore[index]
        world.join(f"n{number + 2}")
    await world.run(5.0)
    assert [o.finish_reason for o in world.delivered() if o.finish_reason] == []
    await world.frontend.close()


@in_virtual_time
async def test_two_requests_that_end_their_instances_fail_alone() -> None:
    world = LivingWorld(["n0", "n1"], lambda request_id, index: request_id in ("poison", "r3"))
    assert sorted(await outcome(world, 90.0)) == ["poison", "r3"]


@in_virtual_time
async def test_a_long_request_outlives_many_deaths_that_it_has_not_caused() -> None:
    world = LivingWorld(["n0", "n1"], lambda request_id, index: False)
    world.submit()
    for _ in range(20):
        await world.run(7.0)
        owner = world.requests.requests["r"].ledger.owner  # type: ignore[index]
        world.leave(owner)
        world.join(f"n{len(world.members) + 10 + len(world.sent(AddRequest))}")
        if len(world.sent(AddRequest)) % MAX_DEATHS == 0:
            await world.run(FORGIVEN_S)
    await world.run(5.0)
    assert [o.finish_reason for o in world.delivered() if o.finish_reason] == []
    await world.frontend.close()
