"""Every expected error is one line and an exit code; an unexpected one is no traceback."""

import sys

import pytest

from pd_serve.cli import main as module
from pd_serve.errors import InvalidRequestError, PdServeError


class Ended(BaseException):
    """The process would have ended with this code."""


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """The command raises what is appended here."""
    errors: list[BaseException] = []

    def app(standalone_mode: bool) -> None:
        raise errors[0]

    def leave(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(module, "app", app)
    monkeypatch.setattr(module.os, "_exit", leave)
    monkeypatch.delenv("PD_SERVE_LOG_LEVEL", raising=False)
    return errors


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (PdServeError("no service there"), 1, "error  no service there\n"),
        (InvalidRequestError("unknown flag --x"), 2, "error  unknown flag --x\n"),
        (OSError(98, "Address in use"), 1, "error  OSError: [Errno 98] Address in use (PD_SERVE_LOG_LEVEL="),
        (RuntimeError("two\n  lines"), 1, "error  RuntimeError: two lines ("),
        (RuntimeError(), 1, "error  RuntimeError: no reason given ("),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    failing: list[BaseException],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    says: str,
) -> None:
    failing.append(error)

    with pytest.raises(Ended) as ended:
        module.main()

    assert ended.value.args == (code,)
    shown = capsys.readouterr().err
    assert shown.startswith(says)
    assert len(shown.splitlines()) == bool(says)


def test_with_the_log_level_debug_an_unexpected_error_is_raised(
    failing: list[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PD_SERVE_LOG_LEVEL", "DEBUG")
    failing.append(RuntimeError("a bug"))

    with pytest.raises(RuntimeError, match="a bug"):
        module.main()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["simulate", "run", "--trase", "x"], "No such option: --trase"),
        (["serve", "--port", "x"], "'--port'"),
        (["serve", "--prefil", "2"], "did you mean --prefill?"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    def leave(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(module.os, "_exit", leave)
    monkeypatch.setattr(sys, "argv", ["pd-serve", *arguments])

    with pytest.raises(Ended) as ended:
        module.main()

    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.args == (2,)
    assert says in line
