"""What an API server derives from its record of a request."""

import asyncio

import pytest

from pd_serve.frontend.token_ledger import TokenLedger
from pd_serve.frontend.tracked_request import TrackedRequest
from router.request import NewRequest
from tests.unit.pd_serve.frontend.frontend_world import R


def tracked(*token_ids: int, max_tokens: int | None = None) -> TrackedRequest:
    ledger = TokenLedger("p0", token_ids=list(token_ids))
    return TrackedRequest(R, [b"payload"], NewRequest(20), ledger, max_tokens)


def test_its_tokens_are_those_of_the_prompt_and_of_the_output() -> None:
    assert tracked().num_tokens == 20
    assert tracked(1, 2, 3).num_tokens == 23


@pytest.mark.parametrize(
    ("max_tokens", "generated", "ends"),
    [(1, 0, True), (2, 0, False), (3, 2, True), (3, 1, False), (3, 3, True), (None, 0, False)],
)
def test_it_ends_with_its_next_prefill_if_one_token_is_left(
    max_tokens: int | None, generated: int, ends: bool
) -> None:
    assert tracked(*range(generated), max_tokens=max_tokens).ends_with_prefill is ends


def test_it_is_on_its_owner_and_on_the_instance_that_it_was_committed_to() -> None:
    request = tracked()
    request.committed_to = "d0"

    assert [request.is_on(name) for name in ("p0", "d0", "d1")] == [True, True, False]


async def test_every_future_that_waits_for_a_move_is_woken_once_and_a_cancelled_one_is_skipped() -> None:
    request = tracked()
    loop = asyncio.get_running_loop()
    waits, gave_up = loop.create_future(), loop.create_future()
    request.move_waiters += [gave_up, waits]
    gave_up.cancel()

    request.wake_move_waiters()
    request.wake_move_waiters()

    assert (waits.done(), gave_up.cancelled(), request.move_waiters) == (True, True, [])
