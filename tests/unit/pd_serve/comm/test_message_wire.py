"""Failures of message handlers: counted by kind, with a bound on the kinds."""

import asyncio
import logging

import pytest

from migration.tasks import BackgroundTasks
from pd_serve.comm.message_wire import MAX_KINDS, HandlerFailures, UnsentMessages


def test_failures_are_counted_by_kind() -> None:
    failures = HandlerFailures("p0")
    for text in ("x", "y", "x"):
        failures.record("handling a Join from api", KeyError(text))

    assert len(failures) == 3
    assert failures.problems() == [
        "p0: handling a Join from api failed: KeyError: 'x' (2 times)",
        "p0: handling a Join from api failed: KeyError: 'y' (1 times)",
    ]


def test_without_failures_there_are_no_problems() -> None:
    failures = HandlerFailures("p0")

    assert (len(failures), failures.problems()) == (0, [])


def test_beyond_the_bound_on_kinds_new_kinds_are_counted_together() -> None:
    """Their texts hold what peers send, so their number has no bound."""
    failures = HandlerFailures("p0")
    for number in range(MAX_KINDS + 50):
        failures.record("decoding a message", ValueError(str(number)))
    failures.record("decoding a message", ValueError("0"))

    problems = failures.problems()
    assert len(failures) == MAX_KINDS + 51
    assert len(problems) == MAX_KINDS + 1
    assert problems[0] == "p0: decoding a message failed: ValueError: 0 (2 times)"
    assert problems[-1] == "p0: further failures in message handlers (50 times)"


def test_a_failure_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        HandlerFailures("p0").record("handling a Join from api", KeyError("x"))

    [record] = caplog.records
    assert record.getMessage() == "p0: handling a Join from api failed"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)


async def test_a_failed_background_task_is_counted() -> None:
    failures = HandlerFailures("p0")
    tasks = BackgroundTasks(failures.task_failed)

    async def fail() -> None:
        raise KeyError("x")

    await asyncio.gather(tasks.start(fail()), return_exceptions=True)

    assert failures.problems() == ["p0: a background task failed: KeyError: 'x' (1 times)"]


def test_a_peer_that_does_not_read_is_logged_once_and_every_dropped_message_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    unsent = UnsentMessages()
    unsent.peer_unknown()
    for _ in range(3):
        unsent.queue_full("b", 1)
        unsent.queue_full("c", "x")

    assert len(unsent) == 7
    assert [record.message for record in caplog.records] == [
        "b does not read: a int is dropped",
        "c does not read: a str is dropped",
    ]


def test_metrics_have_the_number_of_failures_by_kind() -> None:
    failures = HandlerFailures("p0")
    failures.record("decoding a message", ValueError("x"), "decode")
    failures.record("handling a Join from api", KeyError("x"))
    failures.task_failed(KeyError("x"))

    assert failures.by_kind == {"decode": 1, "handler": 1, "call": 0, "task": 1}
