"""Commands for a running service: what they send, and what they show."""

import json
from typing import Any

import pytest

from pd_serve.cli import operate
from pd_serve.errors import InvalidRequestError, PdServeError
from tests.unit.pd_serve.cli.made_answers import answering


def test_a_request_is_migrated_with_the_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = answering(monkeypatch, 200, {"downtime_ms": 12.9, "stages": 2, "blocks": 21, "tokens": 657})

    operate.migrate("demo", "decode-1", url="http://there/", api_key="sk-a")

    assert (sent[0].method, str(sent[0].url)) == ("POST", "http://there/cluster/migrate")
    assert json.loads(sent[0].content) == {"request_id": "demo", "destination": "decode-1"}
    assert sent[0].headers["Authorization"] == "Bearer sk-a"
    assert "657 tokens, 21 blocks in 2 stages, 12.9 ms" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"instance": "decode-1", "stop": True, "undo": True},
        {"instance": "decode-1", "wait": 5.0},
        {"instance": "decode-1", "node": "a"},
        {"node": "a", "stop": True},
    ],
)
def test_a_drain_that_says_two_things_is_refused(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    sent = answering(monkeypatch, 202, {})

    with pytest.raises(InvalidRequestError, match="give an instance"):
        operate.drain(**given)
    assert not sent


def test_violated_invariants_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, 200, {"ok": False, "violations": ["decode-0: 3 blocks leaked", "b"]})

    with pytest.raises(PdServeError, match="3 blocks leaked\nb"):
        operate.integrity(url="http://there")


def test_invariants_that_hold_are_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(monkeypatch, 200, {"ok": True, "violations": []})

    operate.integrity(url="http://there")

    assert "all invariants hold" in capsys.readouterr().err
