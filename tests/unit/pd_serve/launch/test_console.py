"""Progress for the operator: on stderr, as text or as log lines."""

import json
import logging

import pytest

from pd_serve.launch import console as module
from pd_serve.launch.console import Console, LogProgress, instances_shown, service_url
from tests.members import instance_info


def test_progress_goes_to_stderr_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()

    console.step("2 of [default] instances")
    console.warn("keys[1] is [bold]weak[/bold]")
    console.error("no [such] model")

    shown = capsys.readouterr()
    assert shown.out == ""
    step, warning, error = shown.err.splitlines()
    assert step.endswith(" s  2 of [default] instances")
    assert warning == "warning  keys[1] is [bold]weak[/bold]"
    assert error == "error  no [such] model"


@pytest.mark.parametrize(("needs_key", "header"), [(True, "-H 'Authorization: Bearer KEY'"), (False, "")])
def test_the_banner_has_a_command_to_copy(
    capsys: pytest.CaptureFixture[str], needs_key: bool, header: str
) -> None:
    Console().banner("http://127.0.0.1:8000", "tiny", [instance_info("decode-0", pid=7)], needs_key=needs_key)

    shown = capsys.readouterr().err
    (command,) = (line.strip() for line in shown.splitlines() if line.strip().startswith("curl"))
    assert command.startswith("curl http://127.0.0.1:8000/v1/chat/completions")
    assert ("Authorization" in command) == needs_key
    assert header in command
    body = json.loads(command.partition("-d '")[2].removesuffix("'"))
    assert body["model"] == "tiny"
    assert "decode-0 (pid 7)" in shown


def test_the_banner_names_a_few_instances_and_counts_many() -> None:
    few = [instance_info("prefill-0", pid=7), instance_info("decode-0", pid=8)]
    many = [instance_info(f"decode-{number}", pid=number // 16) for number in range(48)]

    assert instances_shown(few) == "prefill-0 (pid 7), decode-0 (pid 8)"
    assert instances_shown(few + many) == "1 prefill, 49 decode, in 5 processes"


def test_the_banner_says_why_requests_cannot_move(capsys: pytest.CaptureFixture[str]) -> None:
    Console().banner(
        "http://h:1", "tiny", [instance_info("neutral-0")], needs_key=False, no_migration="[x] MLA"
    )

    assert "off: [x] MLA" in capsys.readouterr().err


def test_with_the_format_json_progress_is_log_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "is_json", lambda: True)
    console = Console()

    with caplog.at_level(logging.INFO, "pd_serve"):
        console.step("starting")
        console.warn("slow")
        console.banner("http://here", "tiny", [], needs_key=False)

    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO"]
    assert capsys.readouterr().err == ""


def test_without_a_terminal_progress_is_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pd_serve"):
        LogProgress().step("starting")
        LogProgress().warn("slow")

    assert [(r.levelname, r.message) for r in caplog.records] == [("INFO", "starting"), ("WARNING", "slow")]


@pytest.mark.parametrize(
    ("host", "tls", "url"),
    [
        ("127.0.0.1", False, "http://127.0.0.1:8000"),
        ("", True, "https://0.0.0.0:8000"),
        ("::1", False, "http://[::1]:8000"),
    ],
)
def test_the_address_in_the_banner_can_be_asked(host: str, tls: bool, url: str) -> None:
    assert service_url(host, 8000, tls=tls) == url
