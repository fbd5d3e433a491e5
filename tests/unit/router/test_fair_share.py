"""Fair shares of a queue: which account is next, also after idle time and departures."""

from hypothesis import given
from hypothesis import strategies as st

from router.fair_share import OUTPUT_WEIGHT, FairShare

A, B, C = 0, 1, 2


def waiting(*accounts: int) -> FairShare:
    shares = FairShare()
    for account in accounts:
        shares.begins_to_wait(account)
    return shares


def test_an_account_is_charged_for_prompts_and_more_for_outputs() -> None:
    shares = waiting(A, B)
    shares.starts(A, 100)
    shares.generated(B, 30)

    assert (shares.served(A), shares.served(B)) == (100, 30 * OUTPUT_WEIGHT)


def test_idle_time_is_no_credit() -> None:
    """C comes when the others have been served long: it does not go first until it has caught up."""
    shares = waiting(A, A, B, B)
    shares.starts(A, 5000)
    shares.starts(B, 4000)

    shares.begins_to_wait(C)

    assert shares.served(C) == shares.served(B) == 4000


def test_leaving_the_queue_is_no_way_to_lose_what_one_was_served() -> None:
    shares = waiting(A, B)
    shares.starts(A, 5000)
    shares.waits_no_more(A)

    shares.begins_to_wait(A)

    assert shares.served(A) == 5000 > shares.served(B)


def test_outputs_of_an_account_that_does_not_wait_count_when_it_does() -> None:
    shares = waiting(B)
    shares.starts(B, 10)
    shares.generated(A, 100)

    shares.begins_to_wait(A)

    assert shares.served(A) == 10 + 100 * OUTPUT_WEIGHT


def test_without_a_queue_everything_is_forgotten() -> None:
    shares = waiting(A, B)
    shares.starts(A, 5000)
    for account in (A, B):
        shares.waits_no_more(account)
    shares.generated(A, 1000)

    shares.begins_to_wait(A)

    assert (shares.served(A), shares.served(B), shares.num_waiting) == (0, 0, 1)


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=2, max_size=80))
def test_two_backlogged_accounts_differ_by_one_request_at_most(costs: list[tuple[int, int]]) -> None:
    """The bound of VTC for what is charged at once: whatever the sizes of the requests."""
    shares = waiting(*[A, B] * len(costs))
    left = {A: [a for a, _ in costs], B: [b for _, b in costs]}
    while left[A] and left[B]:
        account = min((A, B), key=shares.served)
        shares.starts(account, left[account].pop())
        assert abs(shares.served(A) - shares.served(B)) <= 500
