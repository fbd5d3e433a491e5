"""A line per event: in JSON with the request's id as a field, whichever process it comes from."""

import errno
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pd_serve.launch.console import Console
from pd_serve.observe.logs import (
    FORMAT_VARIABLE,
    INSTANCE,
    LogFormat,
    choose_format,
    configure_logging,
    outlive_streams,
    request_of,
)


@contextmanager
def captured(log_format: LogFormat, process: str = "", *, is_shown: bool = False) -> Iterator[io.StringIO]:
    """Logging configured so, and what is written then. Everything is undone."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        for name in (FORMAT_VARIABLE, "VLLM_CONFIGURE_LOGGING", "PD_SERVE_LOG_LEVEL"):
            patch.setenv(name, "")  # so that it is taken back
            patch.delenv(name)
        choose_format(log_format)
        configure_logging(process, is_shown=is_shown)
        try:
            yield stream
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)


def test_a_text_line_has_time_level_and_message() -> None:
    with captured("text", "decode-0") as stderr:
        logging.getLogger("pd_serve.x").info("request %s: is here", "r1")

    assert stderr.getvalue().endswith(" INFO request r1: is here\n")


def test_a_text_line_begins_with_its_process_if_nothing_else_shows_it() -> None:
    with captured("text", "api-1", is_shown=True) as stderr:
        logging.getLogger("pd_serve.x").info("here")

    assert stderr.getvalue().startswith(f"(api-1 pid={os.getpid()}) ")


@contextmanager
def an_instance(name: str) -> Iterator[None]:
    """Code of an instance that shares its process."""
    token = INSTANCE.set(name)
    try:
        yield
    finally:
        INSTANCE.reset(token)


def test_a_line_of_an_instance_in_a_shared_process_has_its_name() -> None:
    with captured("text", "process-of-decode-0") as text, an_instance("decode-3"):
        logging.getLogger("pd_serve.x").info("request %s: is here", "r1")
    with captured("json", "process-of-decode-0") as lines, an_instance("decode-3"):
        logging.getLogger("pd_serve.x").info("request %s: is here", "r1")

    assert text.getvalue().endswith(" INFO [decode-3] request r1: is here\n")
    line = json.loads(lines.getvalue())
    assert (line["process"], line["request_id"]) == ("decode-3", "r1")


def test_a_json_line_has_process_request_id_and_the_fields_of_its_event() -> None:
    with captured("json", "decode-0") as stderr:
        logging.getLogger("pd_serve.x").info("request %s: is %s", "r1", "here", extra={"event": "queued"})
        logging.getLogger("elsewhere").warning("no request")

    first, second = map(json.loads, stderr.getvalue().splitlines())
    del first["time"], second["time"]
    assert first == {
        "level": "INFO",
        "logger": "pd_serve.x",
        "message": "request r1: is here",
        "process": "decode-0",
        "request_id": "r1",
        "event": "queued",
    }
    assert second == {
        "level": "WARNING",
        "logger": "elsewhere",
        "message": "no request",
        "process": "decode-0",
    }


def test_an_exception_is_part_of_one_json_line() -> None:
    with captured("json") as stderr:
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logging.getLogger("pd_serve.x").exception("it failed")

    (line,) = stderr.getvalue().splitlines()
    assert "ValueError: two" in json.loads(line)["exc_info"]


def test_rays_prefix_of_json_lines_is_removed() -> None:
    """And a line comes out whole, however it is written."""
    with captured("json") as stderr:
        print('(decode-0 pid=123) {"a": 1}', file=sys.stderr)
        print('(decode-0 pid=123, ip=10.0.0.7) {"b": 2}')
        sys.stderr.write("(decode-0 pid=123) not")
        assert "not" not in stderr.getvalue()
        sys.stderr.write(' JSON\n{"c": 3}\n')
        print('(decode-0 pid=123) {"split": "in', file=sys.stderr)  # Ray has read it while it was written
        print('(decode-1 pid=124) {"d": 4}', file=sys.stderr)
        print('(decode-0 pid=123)  two"}', file=sys.stderr)
        print('(decode-0 pid=123) {"cut', file=sys.stderr)
        print("(decode-0 pid=123) Traceback", file=sys.stderr)

    assert stderr.getvalue().splitlines() == [
        '{"a": 1}',
        '{"b": 2}',
        "(decode-0 pid=123) not JSON",
        '{"c": 3}',
        '{"d": 4}',
        '{"split": "in two"}',
        '{"cut',
        "(decode-0 pid=123) Traceback",
    ]


def test_a_process_goes_on_when_its_output_cannot_be_written() -> None:
    class Full(io.StringIO):
        is_full = True

        def write(self, text: str) -> int:
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    with pytest.MonkeyPatch.context() as patch:
        streams = Full(), Full()
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        outlive_streams()
        console = Console()
        for streams[0].is_full, streams[1].is_full in ((True, True), (False, False)):
            console.warn("decode-0 has died")
            print("a line", flush=True)
    assert [stream.getvalue() for stream in streams] == ["a line\n", "warning  decode-0 has died\n"]


@pytest.mark.parametrize(
    ("message", "arguments", "request_id"),
    [
        ("request %s: ended", ("r",), "r"),
        ("request %s: %s -> %s", ("r", "a", "b"), "r"),
        ("requests of %s", ("r",), None),
        ("request r: no argument", (), None),
        ("migration %s: odd", ("m",), None),
    ],
)
def test_a_line_is_about_the_request_in_its_first_argument(
    message: str, arguments: tuple[str, ...], request_id: str | None
) -> None:
    record = logging.LogRecord("x", logging.INFO, "file", 1, message, arguments, None)

    assert request_of(record) == request_id
