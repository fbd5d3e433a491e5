"""The processes of a started service: what each is, what it uses, and signals to them.

Only processes that were found below the started service are named here, so nothing else is ever signalled.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

import psutil


class ProcessKind(StrEnum):
    """What a process of a service is."""

    API_SERVER = "api server"
    MANAGER = "manager"  # `pd-serve serve` itself, or a replica of Ray Serve
    SCHEDULER = "scheduler"
    INSTANCE = "instance"
    RAYLET = "raylet"
    HAPROXY = "haproxy"
    OTHER = "other"


#: Beginnings of the titles that Ray gives to its workers.
_TITLES = {
    "ray::InstanceActor": ProcessKind.INSTANCE,
    "ray::SchedulerActor": ProcessKind.SCHEDULER,
    "ray::ServeReplica:pd-serve:InstanceManager": ProcessKind.MANAGER,
    "ray::ServeReplica:pd-serve:ApiServer": ProcessKind.API_SERVER,
}

#: The module that API servers of `pd-serve serve` run.
_API_SERVER = "pd_serve.launch.api_server_process"


def kind_of(name: str, command: Sequence[str]) -> ProcessKind:
    """The kind of a process with this name and command line."""
    title = " ".join(command)
    for beginning, kind in _TITLES.items():
        if title.startswith(beginning):
            return kind
    if name in ("raylet", "haproxy"):
        return ProcessKind(name)
    if _API_SERVER in command[:4]:
        return ProcessKind.API_SERVER
    is_manager = any(os.path.basename(word) == "pd-serve" for word in command[:2]) and "serve" in command
    return ProcessKind.MANAGER if is_manager else ProcessKind.OTHER


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process uses.

    Attributes:
        memory_mib: Memory of its own (USS): pages that are shared with other processes do not count.
    """

    memory_mib: float
    descriptors: int
    threads: int


class ServiceProcesses:
    """All processes below the roots of a service, including those whose parent has ended since.

    A process id that the system has given to another process meanwhile is not signalled: `psutil` compares
    the start times.
    """

    def __init__(self, *roots: int) -> None:
        self._seen: dict[int, psutil.Process] = {}
        self._roots: list[psutil.Process] = []
        self._sessions: set[int] = set()
        for root in roots:
            self.add_root(root)

    def add_root(self, pid: int) -> None:
        """Another process that was started for this service."""
        self._roots.append(psutil.Process(pid))
        if os.getsid(pid) == pid:
            self._sessions.add(pid)

    def alive(self) -> list[psutil.Process]:
        """All of them that run or are stopped."""
        for root in self._roots:
            with suppress(psutil.NoSuchProcess):
                for process in (root, *root.children(recursive=True)):
                    if process != self._seen.get(process.pid):
                        self._seen[process.pid] = process
        self._seen = {pid: process for pid, process in self._seen.items() if is_alive(process)}
        return list(self._seen.values())

    def of_kind(self, kind: ProcessKind) -> list[psutil.Process]:
        """Living processes of a kind, by process id."""
        return sorted((p for p, found in self.kinds() if found is kind), key=lambda process: process.pid)

    def kinds(self) -> Iterator[tuple[psutil.Process, ProcessKind]]:
        """Each living process and its kind."""
        for process in self.alive():
            with suppress(psutil.NoSuchProcess):
                yield process, kind_of(process.name(), process.cmdline())

    def send(self, process: psutil.Process, number: signal.Signals) -> bool:
        """Sends a signal. Returns whether the process was there to receive it.

        Raises:
            ValueError: The process does not belong to the service.
        """
        if not is_alive(process):
            return False
        if self._seen.get(process.pid) != process:
            raise ValueError(f"process {process.pid} is not one of the service's")
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            return False
        return True

    def resume_all(self) -> None:
        """Lets stopped processes continue."""
        for process in self.alive():
            with suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_STOPPED:
                    process.resume()

    def kill_all(self) -> None:
        """Ends what is left of the service, also in the sessions of its first processes.

        One whose parent has died is below none of them any more, such as a HAProxy that was just started.
        """
        left = self.alive() + [process for process in psutil.process_iter() if self._is_in_session(process)]
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _is_in_session(self, process: psutil.Process) -> bool:
        with suppress(ProcessLookupError):
            return os.getsid(process.pid) in self._sessions
        return False

    def usage(self) -> dict[int, tuple[ProcessKind, Usage]]:
        """What each living process uses, by process id."""
        found = {}
        for process, kind in self.kinds():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied), process.oneshot():
                memory = process.memory_full_info().uss / 2**20
                found[process.pid] = (kind, Usage(memory, process.num_fds(), process.num_threads()))
        return found


def is_alive(process: psutil.Process) -> bool:
    """Whether it exists and is not a zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
