"""Operations on a running service: what is sent, how progress is followed, what is refused."""

from typing import Any

import pytest

from pd_serve.cli import service_client as control
from pd_serve.errors import InvalidRequestError, MigrationRefusedError, PdServeError
from pd_serve.launch.console import Console
from tests.unit.pd_serve.cli.made_answers import answering


class FakeService(control.ServiceClient):
    """Answers as the API does. Each drained instance loses a request whenever it is looked at."""

    def __init__(self, *rows: tuple[str, str, int], refused: str = "") -> None:
        super().__init__("http://127.0.0.1:1", None)
        self._refused = refused
        self.rows = [{"id": i, "node": node, "running": n, "waiting": 0} for i, node, n in rows]
        self.drained: list[str] = []

    def get(self, path: str = "") -> dict[str, Any]:
        for row in self.rows:
            if row["id"] in self.drained:
                row["running"] = max(0, row["running"] - 1)  # type: ignore[call-overload]
        return {"instances": self.rows}

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if body["instance"] == self._refused:
            raise MigrationRefusedError("the last one of its kind")
        self.drained.append(body["instance"])
        return {}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "POLL_S", 0.0)


def test_a_machine_is_drained_until_its_instances_are_empty() -> None:
    service = FakeService(("decode-0", "a", 3), ("decode-1", "b", 5), ("prefill-0", "a", 0))

    control.drain_node(service, Console(), "a", wait_s=60)

    assert service.drained == ["decode-0", "prefill-0"]
    assert [row["running"] for row in service.rows] == [0, 5, 0]


def test_what_cannot_be_done_without_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    service = FakeService(("decode-0", "a", 1), ("prefill-0", "a", 4), refused="prefill-0")

    control.drain_node(service, Console(), "a", wait_s=60)

    assert service.drained == ["decode-0"]
    assert "prefill-0 is not drained: the last one of its kind" in capsys.readouterr().err


def test_it_waits_no_longer_than_told(capsys: pytest.CaptureFixture[str]) -> None:
    service = FakeService(("decode-0", "a", 10**9))

    control.drain_node(service, Console(), "a", wait_s=0)

    assert "a still has" in capsys.readouterr().err


def test_a_machine_without_instances_is_done_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    service = FakeService(("decode-0", "a", 1))

    control.drain_node(service, Console(), "c", wait_s=60)

    assert service.drained == []
    assert "no instances" in capsys.readouterr().err


def test_a_service_that_does_not_answer_is_an_error() -> None:
    with pytest.raises(PdServeError, match="no service at"):
        control.drain_node(control.ServiceClient("http://127.0.0.1:1", None), Console(), "a", wait_s=60)


@pytest.mark.parametrize(
    ("status", "body", "error", "says"),
    [
        (401, {}, PdServeError, "answers 401; give --api-key"),
        (503, {}, PdServeError, "answers 503"),
        (404, {"error": {"message": "no request 'x' is running"}}, MigrationRefusedError, "no request 'x'"),
        (409, {"error": {"message": "it is full"}}, MigrationRefusedError, "it is full"),
    ],
)
def test_a_refusal_is_one_line(
    monkeypatch: pytest.MonkeyPatch, status: int, body: object, error: type[PdServeError], says: str
) -> None:
    answering(monkeypatch, status, body)

    with pytest.raises(error, match=says):
        control.ServiceClient("http://there", "key").get()


def test_a_key_that_no_header_can_have_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="a key must consist of printable ASCII"):
        control.ServiceClient("http://there", "schlüssel")


def test_a_role_has_one_size() -> None:
    with pytest.raises(InvalidRequestError, match="decode is given twice"):
        control.parse_sizes(["decode=2", "prefill=1", "decode=3"])


@pytest.mark.parametrize("text", ["decode", "=4", "decode=x", "drafting=3"])
def test_sizes_must_be_a_role_and_a_number(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        control.parse_sizes([text])


class RestartingService(control.ServiceClient):
    """Answers `GET /cluster` with these states of a restart; each time the old instance is replaced."""

    def __init__(self, *states: dict[str, Any] | None) -> None:
        super().__init__("http://127.0.0.1:1", None)
        self._states: list[dict[str, Any] | None] = [{"running": False, "progress": ""}, *states]

    def get(self, path: str = "") -> dict[str, Any]:
        state = self._states.pop(0)
        name = "decode-1" if not self._states else "decode-0"
        return {"instances": [{"id": name, "pid": 1}], "restart": state}

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return {}


def test_a_restart_is_followed_through_an_api_server_without_a_report_of_the_manager(
    capsys: pytest.CaptureFixture[str],
) -> None:
    running = {"running": True, "progress": "0 of 1"}
    service = RestartingService(running, None, {"running": False, "progress": "1 of 1"})

    control.restart(service, Console())

    assert [line.rsplit("  ")[-1] for line in capsys.readouterr().err.splitlines()] == [
        "restart: 0 of 1",
        "restart: 1 of 1",
    ]
