"""A process that has imported an engine's modules, from which the processes of instances are forked.

vLLM's import takes ten seconds of a core. A process that is forked from one that has done it starts in a
tenth of a second, and shares the memory of the modules.

A process that wants to be run from here (`pd_serve/platform/fork_client.py`) sends its command line,
environment, working directory and streams, and ends; the forked process goes on in its place. Both sides look
whether the other one is a process of the same user. The forked processes do not end with the fork server.
"""

import contextlib
import gc
import importlib
import logging
import os
import runpy
import secrets
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from migration.child_process import end_with
from pd_serve.platform.fork_client import check_peer

logger = logging.getLogger(__name__)

#: Maximum time for an order to arrive once its sender is connected, in seconds.
ORDER_S = 5.0

#: Largest command line with its environment, in bytes.
MAX_ORDER_BYTES = 4 * 2**20

#: Processes that may wait to be forked.
BACKLOG = 256


#: Ray reads the environment of its process, such as the id of the job, when it is imported.
IN_EACH_PROCESS = ("ray",)

#: What runs a script in a forked process.
CLIENT = Path(__file__).with_name("fork_client.py")


class ForkOrder(msgspec.Struct, frozen=True):
    """What a process has been started with.

    Attributes:
        argv: The script, and its arguments.
        blocked_signals: Numbers of the signals that it blocks.
    """

    argv: list[str]
    environment: dict[str, str]
    directory: str
    blocked_signals: list[int]


def receive(connection: socket.socket) -> tuple[ForkOrder, list[int]]:
    """Reads an order up to the end of its stream, and the file descriptors of its streams.

    Raises:
        ValueError: It is no order.
    """
    chunks: list[bytes] = []
    streams: list[int] = []
    size = 0
    try:
        while True:
            chunk, found, _, _ = socket.recv_fds(connection, 1 << 16, 3)
            streams += found
            size += len(chunk)
            if size > MAX_ORDER_BYTES:
                raise ValueError("the order is too long")
            if not chunk:
                break
            chunks.append(chunk)
        order = msgspec.json.decode(b"".join(chunks), type=ForkOrder)
        if not order.argv or len(streams) != 3:
            raise ValueError("no command line, or not three streams")
    except BaseException:
        for stream in streams:
            os.close(stream)
        raise
    return order, streams


def become(order: ForkOrder, streams: list[int]) -> None:
    """Makes this forked process what the order asks for, up to its command line."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(order.environment)
    os.chdir(order.directory)
    sys.argv = order.argv
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, order.blocked_signals)


class Promise:
    """The answer to a client, for which the forked process waits: otherwise the script could run twice."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def wait(self) -> None:
        """Ends this process if the client has not been answered."""
        os.close(self._write)
        self._write = -1
        if not os.read(self._read, 1):
            os._exit(0)

    def keep(self) -> None:
        os.write(self._write, b"1")

    def close(self) -> None:
        os.close(self._read)
        if self._write >= 0:
            os.close(self._write)


def serve(listener: socket.socket) -> ForkOrder:
    """Forks a process for each order. Returns in the forked processes only, with what they are to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel removes processes that have ended
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(ORDER_S)
            try:
                check_peer(connection)
                order, streams = receive(connection)
            except (ValueError, OSError) as error:
                logger.warning("an order to fork a process cannot be read: %s", error)
                continue
            with contextlib.closing(Promise()) as promise:
                try:
                    pid = os.fork()
                except OSError as error:  # no memory, or too many processes
                    logger.error("no process can be forked: %s", error)
                    pid = -1
                if pid == 0:
                    listener.close()
                    connection.close()
                    promise.wait()
                    become(order, streams)
                    return order
                for stream in streams:
                    os.close(stream)
                if pid > 0:
                    with contextlib.suppress(OSError):  # the client has ended
                        connection.sendall(str(pid).encode())
                        promise.keep()


def import_all(modules: Sequence[str]) -> None:
    """Imports modules, but none of `IN_EACH_PROCESS`, which seem not to be installed meanwhile."""
    hidden = [name for name in IN_EACH_PROCESS if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # importing them fails
    for module in modules:
        importlib.import_module(module)
    for name in hidden:
        del sys.modules[name]


def main(listener: socket.socket, ready: int, parent: int, modules: Sequence[str]) -> None:
    """Imports the modules, and then forks processes, until the process `parent` ends.

    Args:
        ready: File descriptor of a pipe; gets a byte when orders are carried out.
    """
    end_with(parent)
    gc.disable()  # collecting takes a tenth of the time of the imports
    logging.disable(logging.WARNING)  # torch says that there is no Triton, on the operator's terminal
    import_all(modules)
    logging.disable(logging.NOTSET)
    gc.freeze()
    os.write(ready, b"1")
    os.close(ready)
    order = serve(listener)
    gc.enable()
    runpy.run_path(order.argv[0], run_name="__main__")


class ForkServer:
    """A fork server, in a child process that ends with this thread.

    Args:
        modules: What it imports.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._name = f"pd-serve-{secrets.token_hex(8)}"
        self._ready, ready = os.pipe()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(f"\0{self._name}")
            listener.listen(BACKLOG)  # orders wait from here on
            passed = (listener.fileno(), ready)
            command = [sys.executable, "-m", __spec__.name, *map(str, (*passed, os.getpid())), *modules]
            # Ctrl-C in a terminal is for this process, which ends the others: another group. Not another
            # session: Linux gives each an equal share of the cores (autogroups), and all instances together
            # would get as much as any other process that has one.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=passed, process_group=0
            )
        os.close(ready)

    @property
    def python(self) -> str:
        """A command in the place of a Python interpreter: the script after it runs in a forked process."""
        return shlex.join([sys.executable, "-S", str(CLIENT), self._name])

    def wait(self) -> None:
        """Blocks until it has imported the modules, or has ended: scripts run without it then."""
        if not os.read(self._ready, 1):
            logger.warning("the fork server has ended (%d): starts are slower", self._process.wait())

    def close(self) -> None:
        """Ends it. Processes that were forked go on."""
        self._process.kill()
        self._process.wait()
        os.close(self._ready)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
