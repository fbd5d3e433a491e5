"""Accounts of API keys at one API server: refusals, headers, and what requests are charged."""

from collections.abc import AsyncIterator
from itertools import count

import pytest
from vllm.v1.engine import FinishReason

from migration.messages import RequestId
from pd_serve.comm.membership import MANAGER
from pd_serve.comm.messages import AddRequest
from pd_serve.errors import RequestRefusedError
from pd_serve.frontend.accounts import Accounts
from router.dispatcher import Dispatcher
from router.fair_share import OUTPUT_WEIGHT, FairShare
from router.load import InstanceLoad
from router.rate_limits import KeyLimits
from router.request import NewRequest
from tests.members import membership
from tests.unit.pd_serve.frontend.frontend_world import World


def test_a_limit_that_is_reached_is_refused_with_the_time_to_wait() -> None:
    accounts = Accounts([KeyLimits(rpm=2)])
    for _ in range(2):
        accounts.take(0, 1, 10)

    with pytest.raises(RequestRefusedError, match="2 requests per minute is reached") as refused:
        accounts.take(0, 1, 10)

    assert (refused.value.code, refused.value.retry_after_s) == ("rate_limit_exceeded", 30)
    accounts.give_back(0, 1, 10)
    accounts.take(0, 1, 10)


def test_a_refusal_names_the_limit_of_the_service_and_the_part_of_the_api_server() -> None:
    accounts = Accounts([KeyLimits(rpm=5)])
    accounts.limits.num_servers = 2
    for _ in range(2):
        accounts.take(0, 1, 10)

    with pytest.raises(RequestRefusedError, match="5 requests per minute is reached at this one of 2 API"):
        accounts.take(0, 1, 10)
    assert accounts.headers(0)["x-ratelimit-limit-requests"] == "2"


def test_headers_say_what_is_left() -> None:
    accounts = Accounts([KeyLimits(rpm=2), KeyLimits(rpm=60, tpm=6000)])
    accounts.take(1, 3, 100)
    accounts.limits.generated(1, 10_000)

    assert accounts.headers(1) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "57",
        "x-ratelimit-reset-requests": "3.000s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "101.000s",
    }
    assert Accounts().headers(0) == {}


@pytest.mark.parametrize(
    ("accounts", "is_used"),
    [
        (Accounts(), False),
        (Accounts([KeyLimits()]), False),
        (Accounts([KeyLimits(), KeyLimits(tpm=5)]), True),
        (Accounts([], FairShare()), True),
    ],
)
def test_accounts_are_off_unless_configured(accounts: Accounts, is_used: bool) -> None:
    assert accounts.is_used is is_used


class WorldOfKeys(World):
    """A frontend with a limit for two keys, and shares."""

    def __init__(self) -> None:
        turns = count()
        self.accounts = Accounts(
            [KeyLimits(tpm=1000)] * 2,
            FairShare(),
            in_turn=lambda payload: [*payload, b"%d" % next(turns)],
        )
        super().__init__(Dispatcher(bounds_backlog=True), self.accounts)

    def ask(self, name: str, account: int, prompt_tokens: int = 3000) -> None:
        self.requests.submit(name, [b"payload"], NewRequest(prompt_tokens, account=account))

    @property
    def order(self) -> list[str]:
        return [add.request_id for _, add in self.sent(AddRequest)]


@pytest.fixture
async def keys() -> AsyncIterator[WorldOfKeys]:
    world = WorldOfKeys()
    world.join("p0", "d0")
    yield world
    await world.frontend.close()


async def test_outputs_are_charged_once_while_a_request_runs_and_at_its_end(keys: WorldOfKeys) -> None:
    keys.requests.submit("r", [b"payload"], NewRequest(20, account=1))
    keys.tokens("p0", 0, 0, 10, 11)
    for _ in range(3):
        keys.accounts.charge(keys.requests.requests.values())
    assert keys.accounts.limits.budgets(1, 0.0)[0].remaining == 998

    keys.tokens("p0", 0, 2, 12, finish=FinishReason.STOP)

    assert keys.accounts.limits.budgets(1, 0.0)[0].remaining == 997
    assert keys.accounts.limits.budgets(0, 0.0)[0].remaining == 1000


async def test_limits_are_divided_among_the_api_servers(keys: WorldOfKeys) -> None:
    servers = ["api", "api-2", "api-3", "api-4"]
    keys.wire.hear(MANAGER, membership(*keys.members, api_servers=servers))

    assert keys.accounts.limits.num_servers == 4


async def test_a_key_that_floods_the_queue_does_not_delay_another_one(keys: WorldOfKeys) -> None:
    """The instance has a backlog of two steps at most; the rest waits here, and the keys take turns."""
    for number in range(6):
        keys.ask(f"flood-{number}", 0)
    keys.ask("late-0", 1)
    keys.ask("late-1", 1)
    assert keys.order == ["flood-0", "flood-1"]

    for done in range(2, 8):
        keys.report("p0", waiting_tokens=0, requests_added=done)

    order = keys.order
    assert len(order) == 8
    assert order.index("late-1") <= 5
    assert [name for name in order if name.startswith("flood")] == [f"flood-{n}" for n in range(6)]


async def test_an_instance_keeps_the_order_of_the_line(keys: WorldOfKeys) -> None:
    """Its own queue is in the order of arrival. There a flood that came first would go before all others."""
    for number in range(5):
        keys.ask(f"flood-{number}", 0)
    keys.ask("late", 1)
    for done in range(2, 6):
        keys.report("p0", waiting_tokens=0, requests_added=done)

    order = keys.order
    assert order.index("late") < 5
    assert [keys.requests.requests[RequestId(name)].payload[1:] for name in order] == [
        [b"%d" % turn] for turn in range(6)
    ]


async def test_a_request_does_not_go_past_those_that_wait(keys: WorldOfKeys) -> None:
    for number in range(3):
        keys.ask(f"flood-{number}", 0)
    room = InstanceLoad("p0", "prefill", total_blocks=100, free_blocks=100, requests_added=2)
    keys.frontend.instances.loads.report(room)
    keys.ask("small", 0, 10)
    assert keys.order == ["flood-0", "flood-1"]

    keys.report("p0", requests_added=2)

    assert keys.order == ["flood-0", "flood-1", "flood-2", "small"]


async def test_a_client_that_leaves_the_queue_leaves_nothing_there(keys: WorldOfKeys) -> None:
    for number in range(5):
        keys.ask(f"flood-{number}", 0)
    keys.ask("late", 1)
    shares = keys.accounts.shares
    assert shares is not None

    keys.requests.abort([f"flood-{number}" for number in range(5)])
    assert shares.num_waiting == 1
    keys.requests.abort(["late"])

    assert (shares.num_waiting, shares.served(0), keys.frontend.num_waiting) == (0, 0.0, 0)
    assert keys.frontend._placement.demand.requests == 0


async def test_outputs_count_towards_a_keys_share(keys: WorldOfKeys) -> None:
    keys.ask("a", 0)
    keys.ask("b", 0)
    keys.ask("waits", 1)
    keys.tokens("p0", 0, 0, 10, 11, of="a")
    keys.accounts.charge(keys.requests.requests.values())

    shares = keys.accounts.shares
    assert shares is not None
    assert shares.served(0) == 2 * OUTPUT_WEIGHT
