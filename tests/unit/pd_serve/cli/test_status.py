"""`pd-serve status`: what `GET /cluster` says, as text."""

from typing import Any

import pytest

from migration.errors import Refusal, RefusalCode
from pd_serve.cli.service_client import ServiceClient
from pd_serve.cli.status import show, show_request
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
    "api_servers": [{"id": "api-5f0c2a91", "pid": 19, "requests": 12}],
    "waiting_line": {"requests": 3, "tokens": 2400},
    "migrations": {"handoff": {"committed": 5, "aborted": 1}},
    "scheduler": {"state": "alive", "policy": "llumnix", "pid": 18, "restarts": 0},
    "decisions": [{"seconds_ago": 2.0, "what": "neutral-0 is drained: by hand"}],
}


class Service(ServiceClient):
    """Answers every path with one body."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__("http://there", None)
        self._body = body
        self.paths: list[str] = []

    def get(self, path: str = "") -> dict[str, Any]:
        self.paths.append(path)
        return self._body


def test_instances_migrations_and_decisions_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show(Service(CLUSTER))

    shown = capsys.readouterr().out
    for text in (
        "neutral-0",
        "empty",
        "-inf",
        "api-5f0c2a91: pid 19, 12 requests",
        "3 requests in line for an instance with room, 2400 tokens",
        "handoff",
        "policy llumnix",
        "neutral-0 is drained: by hand",
    ):
        assert text in shown


def test_attainment_is_shown_if_requests_have_targets(capsys: pytest.CaptureFixture[str]) -> None:
    show(Service(CLUSTER | {"targets": {"requests": 0, "met": 0, "attainment": None, "goodput": 0.0}}))
    assert "targets" not in capsys.readouterr().out
    show(Service(CLUSTER | {"targets": {"requests": 90, "met": 60, "attainment": 0.6667, "goodput": 1.0}}))
    assert "66.7 % of 90 requests with targets" in capsys.readouterr().out


def test_a_cluster_whose_manager_has_not_reported_is_shown_without_scheduler(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show(Service(CLUSTER | {"manager": "absent", "scheduler": None, "decisions": []}))

    shown = capsys.readouterr().out
    assert "neutral-0" in shown
    assert "scheduler" not in shown


def test_the_stages_of_a_request_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = RequestRecorder()
    recorder.issued("cmpl-x-0-1", 10.0, NewRequest(7), name="cmpl-x-0")
    recorder.dispatched("cmpl-x-0-1", "p0", "prefill", 10.0)
    recorder.first_token_from("cmpl-x-0-1", "p0", "prefill", 10.5)
    refused = migrated("cmpl-x-0-1", refusal=Refusal(RefusalCode.NO_FREE_BLOCKS, "refused: it is full"))
    recorder.migrated(refused, 11.0)
    service = Service({"id": "x", "requests": recorder.find("x")})

    show_request(service, "x")

    shown = capsys.readouterr().out
    for text in ("cmpl-x-0-1 (cmpl-x-0): decode", "prefill", "0.500 s", "p0 -> d0", "refused: it is full"):
        assert text in shown
    assert service.paths == ["requests/x"]


def test_instances_that_cannot_move_requests_are_named_with_the_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show(Service({**CLUSTER, "instances": [INSTANCE | {"no_migration": "speculative decoding"}]}))

    assert "neutral-0 serves without migration: speculative decoding" in capsys.readouterr().out


def test_requests_that_cannot_move_are_counted_by_reason(capsys: pytest.CaptureFixture[str]) -> None:
    show(Service({**CLUSTER, "instances": [INSTANCE | {"unmovable": {"session": 2}}]}))

    assert "neutral-0: 2 requests stay there until they end: session" in capsys.readouterr().out


def test_a_running_request_is_shown_with_the_instance_that_it_is_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recorder = RequestRecorder()
    recorder.issued("r", 0.0, NewRequest(10, 0, ()))

    show_request(Service({"requests": recorder.find("r")}), "r")
    assert "waiting for an instance" in capsys.readouterr().out
    recorder.dispatched("r", "prefill-0", "prefill", 1.0)
    show_request(Service({"requests": recorder.find("r")}), "r")
    assert "prefill on prefill-0" in capsys.readouterr().out
    recorder.first_token_from("r", "prefill-0", "prefill", 2.0)
    recorder.first_token_from("r", "decode-1", "decode", 3.0)
    show_request(Service({"requests": recorder.find("r")}), "r")
    assert "decode on decode-1" in capsys.readouterr().out
    recorder.ended("r", "stop", 4.0)
    assert recorder.find("r")[0]["instance"] is None
