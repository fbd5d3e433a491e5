"""A server under test: a real process, everything that it starts, and what must be left of it (nothing)."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import psutil

from tests.environment import START_ENVIRONMENT

READY_S = 240.0
STOP_S = 30.0
SHM = Path("/dev/shm")


class ServerProcess:
    """Started by the constructor; its output goes to `log`.

    Args:
        port: Where it serves; 0 if it chooses one and shows it in a banner.
    """

    def __init__(
        self, command: list[str], log: Path, port: int = 0, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        self.port = port
        self._shm_before = set(os.listdir(SHM)) if SHM.is_dir() else set()
        self._started: dict[int, psutil.Process] = {}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**START_ENVIRONMENT, **(environment or {})},
            )
        self._root = psutil.Process(self.process.pid)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self, bound_s: float = READY_S) -> None:
        deadline = time.monotonic() + bound_s
        while not self._answers():
            assert self.process.poll() is None, f"the server has ended:\n{self.tail()}"
            assert time.monotonic() < deadline, f"the server is not ready:\n{self.tail()}"
            time.sleep(0.2)
        self.note_processes()

    def tail(self, size: int = 4000) -> str:
        with self.log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            return file.read().decode(errors="replace")

    def note_processes(self) -> None:
        """Remembers what runs below the server now, to look for it when the server has ended."""
        for process in self._below():
            self._started.setdefault(process.pid, process)

    def signal_and_wait(self, number: int = signal.SIGTERM) -> list[str]:
        """Stops the server with a signal. Returns what is left of it `STOP_S` later, in words."""
        self.note_processes()
        self.process.send_signal(number)
        return self.wait_gone()

    def wait_gone(self, bound_s: float = STOP_S) -> list[str]:
        """Waits until nothing is left, at most `bound_s`. Returns what is left, in words."""
        deadline = time.monotonic() + bound_s
        while (left := self._left()) and time.monotonic() < deadline:
            self.note_processes()
            time.sleep(0.1)
        return left

    def kill(self) -> None:
        """Ends whatever is left, so that a failed test disturbs no other."""
        self.note_processes()
        for process in [self._root, *self._started.values()]:
            if _alive(process):
                process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        if not self.port and (shown := re.search(r"endpoint\s+http://[^:]+:(\d+)/v1", self.tail(100_000))):
            self.port = int(shown[1])
        try:
            return bool(self.port) and httpx.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def _below(self) -> list[psutil.Process]:
        try:
            return self._root.children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _left(self) -> list[str]:
        left = [] if self.process.poll() is not None else [f"the server itself (pid {self.process.pid})"]
        left += [
            f"process {process.pid}: {_name(process)}"
            for process in self._started.values()
            if _alive(process)
        ]
        left += [f"/dev/shm/{name}" for name in self._shm_left()]
        left += [f"SysV shared memory {segment}" for segment in self._sysv_left()]
        return left

    def _shm_left(self) -> list[str]:
        """New files in /dev/shm that are no other server's: nobody alive holds or tracks them."""
        if not SHM.is_dir() or not (new := set(os.listdir(SHM)) - self._shm_before):
            return []
        held = set()
        for process in psutil.process_iter():
            try:
                if process.pid not in self._started and "multiprocessing.resource_tracker" in _name(process):
                    # Also of killed processes, such as a test's workers: the tracker removes them at its end.
                    held |= {name for name in new if name.startswith(("sem.mp-", "psm_"))}
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                links = [os.readlink(fd) for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
            except OSError:
                continue
            held |= {name for name in new if f"/dev/shm/{name}" in maps or f"/dev/shm/{name}" in links}
        return sorted(new - held)

    def _sysv_left(self) -> list[str]:
        ours = {str(pid) for pid in [self.process.pid, *self._started]}
        try:
            rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()]
        except OSError:
            return []
        creator, segment = rows[0].index("cpid"), rows[0].index("shmid")
        return [row[segment] for row in rows[1:] if row[creator] in ours]


def pd_serve(*arguments: str) -> list[str]:
    """The command line of the installed `pd-serve`."""
    return [str(Path(sys.executable).with_name("pd-serve")), *arguments]


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120] or process.name()
    except psutil.NoSuchProcess:
        return "ended by now"
