"""The log of a run: lines of the trace, and errors that no fault excuses."""

import logging
from collections.abc import Callable

from pd_serve.simulation.faults.process_loop import PROCESS, ProcessLoop


class RunLog(logging.Handler):
    """Takes all log records of one run.

    Args:
        on_error: Called with the text of each record of level ERROR or higher.
        keep: Whether the lines are kept, for a trace.
    """

    def __init__(self, loop: ProcessLoop, on_error: Callable[[str], None], *, keep: bool) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._loop = loop
        self._on_error = on_error
        self._keep = keep
        self._level = logging.WARNING

    def note(self, text: str) -> None:
        """Adds a line to the trace."""
        if self._keep:
            self.lines.append(f"{self._loop.now:9.4f}  {PROCESS.get():<12} {text}")

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.note(f"{record.levelname.lower():<8} {text}")
        if record.levelno >= logging.ERROR:
            error = record.exc_info[1] if record.exc_info else None
            self._on_error(f"{text}: {error!r}" if error is not None else text)

    def __enter__(self) -> "RunLog":
        root = logging.getLogger()
        self._level, self._handlers = root.level, root.handlers[:]
        root.handlers[:] = [self]
        root.setLevel(logging.DEBUG if self._keep else logging.ERROR)
        return self

    def __exit__(self, *error: object) -> None:
        root = logging.getLogger()
        root.handlers[:] = self._handlers
        root.setLevel(self._level)
