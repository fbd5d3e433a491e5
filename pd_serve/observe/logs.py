"""Logging of the service's processes, as text or as JSON lines.

A message about a request starts with `request %s: ` with the request id as first argument. JSON lines have it
as a field, in every process.
"""

import contextlib
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]

#: Inherited by the processes that Ray starts.
FORMAT_VARIABLE = "PD_SERVE_LOG_FORMAT"

#: Name of the instance that a task belongs to, in a process of several: tasks that it starts inherit it.
INSTANCE: ContextVar[str] = ContextVar("instance", default="")

#: Ray's prefix of a line of another process. JSON lines have their own field for the process.
RAY_PREFIX = re.compile(r"(\([^()]*\bpid=\d+[^()]*\)) ")


def configure_logging(process: str = "", *, is_shown: bool = False) -> None:
    """Configures logging with the level in `PD_SERVE_LOG_LEVEL` (default INFO; DEBUG logs every hand-off).

    Args:
        process: Name of the process in JSON lines. In lines of an instance that shares its process it is the
            instance's name, which text lines have in brackets.
        is_shown: Whether text lines begin with the name, too. Those of Ray's processes get it from Ray.
    """
    level = os.environ.get("PD_SERVE_LOG_LEVEL", "INFO").upper()
    handler = logging.StreamHandler()
    if is_json():
        handler.setFormatter(_json_formatter(process))
    else:
        begin = f"({process} pid={os.getpid()}) " if is_shown else ""
        handler.setFormatter(logging.Formatter(f"{begin}%(asctime)s %(levelname)s %(instance)s%(message)s"))
        handler.addFilter(_add_instance)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for ours in ("pd_serve", "migration", "router"):
        logging.getLogger(ours).setLevel(level)
    # Warnings of libraries at every start on a CPU, about nothing that the user could change.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\..*")


def is_json() -> bool:
    return os.environ.get(FORMAT_VARIABLE) == "json"


def choose_format(log_format: LogFormat) -> None:
    """Sets the format for this process and those it starts. Call it before `configure_logging`."""
    os.environ[FORMAT_VARIABLE] = log_format
    if log_format == "json":
        os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # its loggers propagate to the root then
        sys.stdout, sys.stderr = _WithoutPrefix(sys.stdout), _WithoutPrefix(sys.stderr)


def outlive_streams() -> None:
    """From now on what cannot be written to stdout and stderr is dropped, and its writer goes on."""
    sys.stdout, sys.stderr = _Dropping(sys.stdout), _Dropping(sys.stderr)


def _add_instance(record: logging.LogRecord) -> bool:
    instance = INSTANCE.get()
    record.instance = f"[{instance}] " if instance else ""
    return True


def request_of(record: logging.LogRecord) -> str | None:
    """The request id of a log record; None if it is not about a request."""
    if isinstance(record.msg, str) and record.msg.startswith("request %s") and record.args:
        return str(record.args[0]) if isinstance(record.args, tuple) else None
    return None


def _json_formatter(process: str) -> logging.Formatter:
    from pythonjsonlogger.core import RESERVED_ATTRS
    from pythonjsonlogger.json import JsonFormatter

    class JsonLines(JsonFormatter):
        def add_fields(
            self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
        ) -> None:
            super().add_fields(log_data, record, message_dict)
            if (request_id := request_of(record)) is not None:
                log_data["request_id"] = request_id
            log_data["process"] = INSTANCE.get() or process or f"pid-{os.getpid()}"

    return JsonLines(
        ["levelname", "name", "message"],
        style=",",
        rename_fields={"levelname": "level", "name": "logger"},
        timestamp="time",
        reserved_attrs=[*RESERVED_ATTRS, "vllm_process_name"],  # vLLM adds it to every record
    )


class _Dropping:
    """A stream whose writes do not fail when its terminal is closed, its reader gone, or its disk full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _WithoutPrefix:
    """A stream that removes `RAY_PREFIX` from the JSON lines of other processes.

    Ray writes them from another thread, the line break in a call of its own: lines are buffered per thread
    until they are complete, so that they do not mix. A line that Ray has read while it was written comes as
    two, which are put together.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = threading.local()
        self._parts: dict[str, str] = {}  # first parts of JSON lines, by prefix

    def write(self, text: str) -> int:
        whole, newline, rest = (getattr(self._begun, "line", "") + text).rpartition("\n")
        self._begun.line = rest
        if newline:
            lines = [found for line in whole.split("\n") for found in self._without_prefix(line)]
            self._stream.write("".join(f"{line}\n" for line in lines))
        return len(text)

    def _without_prefix(self, line: str) -> Iterator[str]:
        if (found := RAY_PREFIX.match(line)) is None:
            yield line
            return
        prefix, text = found[1], line[found.end() :]
        begun = self._parts.pop(prefix, "")
        if begun and not text.startswith("{") and text.endswith("}"):
            yield begun + text
            return
        if begun:
            yield begun  # the rest has not come
        if text.startswith("{") and not text.endswith("}"):
            self._parts[prefix] = text
        else:
            yield text if text.startswith("{") else line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
