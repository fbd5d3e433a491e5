"""`pd-serve status`: what `GET /cluster` says, as text."""

from typing import Any

import httpx
import pytest

from migration.errors import Refusal, RefusalCode
from pd_serve.cli.status import show, show_request
from pd_serve.errors import PdServeError
from pd_serve.observe.recorder import RequestRecorder
from router.request import NewRequest
from tests.unit.pd_serve.made_migrations import migrated

INSTANCE = {
    "id": "neutral-0",
    "role": "neutral",
    "state": "draining",
    "draining": True,
    "node": "here",
    "pid": 17,
    "total_blocks": 71,
    "free_blocks": 71,
    "running": 0,
    "waiting": 0,
    "freeness": None,
    "migrating_in": 0,
    "migrating_out": 0,
}
CLUSTER: dict[str, Any] = {
    "instances": [INSTANCE],
    "waiting_line": {"requests": 3, "tokens": 2400},
    "migrations": {"handoff": {"committed": 5, "aborted": 1}},
    "scheduler": {"state": "alive", "policy": "llumnix", "pid": 18, "restarts": 0},
    "decisions": [{"seconds_ago": 2.0, "what": "neutral-0 is drained: by hand"}],
}


def answer(monkeypatch: pytest.MonkeyPatch, status: int, body: object) -> None:
    monkeypatch.setattr(httpx, "get", lambda url, **options: httpx.Response(status, json=body))


def test_everything_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answer(monkeypatch, 200, CLUSTER)

    show("http://there", None)

    shown = capsys.readouterr().out
    for text in (
        "neutral-0",
        "empty",
        "-inf",
        "3 requests in line for an instance with room, 2400 tokens",
        "handoff",
        "policy llumnix",
        "neutral-0 is drained: by hand",
    ):
        assert text in shown


@pytest.mark.parametrize(("status", "says"), [(401, "answers 401; give --api-key"), (503, "answers 503")])
def test_a_refusal_is_one_line(monkeypatch: pytest.MonkeyPatch, status: int, says: str) -> None:
    answer(monkeypatch, status, {})

    with pytest.raises(PdServeError, match=says):
        show("http://there", "key")


def test_a_request_s_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = RequestRecorder()
    recorder.issued("cmpl-x-0-1", 10.0, NewRequest(7), name="cmpl-x-0")
    recorder.dispatched("cmpl-x-0-1", "p0", "prefill", 10.0)
    recorder.spoke("cmpl-x-0-1", "p0", "prefill", 10.5)
    refused = migrated("cmpl-x-0-1", refusal=Refusal(RefusalCode.NO_FREE_BLOCKS, "refused: it is full"))
    recorder.migrated(refused, 11.0)
    answer(monkeypatch, 200, {"id": "x", "requests": recorder.find("x")})

    show_request("http://there", None, "x")

    shown = capsys.readouterr().out
    for text in ("cmpl-x-0-1 (cmpl-x-0): decode", "prefill", "0.500 s", "p0 -> d0", "refused: it is full"):
        assert text in shown


def test_no_such_request(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, 404, {"error": {"message": "no request 'x' is running"}})

    with pytest.raises(PdServeError, match="no request 'x'"):
        show_request("http://there", None, "x")
