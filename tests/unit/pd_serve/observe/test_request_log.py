"""One log line for every step of a request."""

import logging

import pytest

from pd_serve.observe.recorder import RequestRecorder
from pd_serve.observe.request_log import RequestLog
from router.request import NewRequest
from tests.unit.pd_serve.made_migrations import FULL, migrated


def test_every_step_of_a_request_is_a_line_with_its_numbers_as_fields(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder = RequestRecorder([RequestLog(logging.INFO)])
    with caplog.at_level(logging.INFO, logger="pd_serve.observe.request_log"):
        recorder.issued("r", 10.0, NewRequest(100))
        recorder.dispatched("r", "p0", "prefill", 10.0)
        recorder.migrated(migrated("r", stages=2, blocks=7), 11.0)
        recorder.migrated(migrated("r", refusal=FULL), 12.0)

    assert caplog.messages == [
        "request r: issued as r, 100 prompt tokens",
        "request r: sent to p0",
        "request r: handoff p0 -> d0 committed",
        "request r: handoff p0 -> d0 aborted",
    ]
    issued, dispatched, committed, aborted = (vars(record) for record in caplog.records)
    assert (issued["event"], issued["prompt_tokens"]) == ("issued", 100)
    assert (dispatched["event"], dispatched["instance"]) == ("dispatched", "p0")
    assert (committed["stages"], committed["blocks"], committed["code"]) == (2, 7, None)
    assert (aborted["code"], aborted["why"]) == ("no_free_blocks", "full")
