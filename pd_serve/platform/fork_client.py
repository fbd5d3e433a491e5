"""Runs a Python script in a process that is forked from a fork server; a Python interpreter in Ray's eyes.

    python -S fork_client.py NAME SCRIPT ARGUMENT...

Sends what it was started with to the fork server of that name, and ends when the other process runs. Without
a server that answers, it runs the script itself, as if this file were not there. It imports only the standard
library: it starts in a fiftieth of a second.
"""

import json
import os
import signal
import socket
import struct
import sys

#: Maximum wait for the server, in seconds: one that has imported answers at once, unless it is stopped. Ray
#: waits 60 s for a process, which then still has to import everything.
ANSWER_S = 10.0


def order(argv: list[str]) -> bytes:
    """What this process was started with; see `pd_serve.platform.fork_server.ForkOrder`."""
    return json.dumps(
        {
            "argv": argv,
            "environment": dict(os.environ),
            "directory": os.getcwd(),
            "blocked_signals": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        }
    ).encode()


def check_peer(connection: socket.socket) -> None:
    """Raises: PermissionError: The other side is not a process of this user."""
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    if struct.unpack("3i", peer)[1] != os.geteuid():
        raise PermissionError("a process of another user")


def run_there(name: str, argv: list[str]) -> bool:
    """Whether a process has been forked for the script."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_S)
        try:
            connection.connect(f"\0{name}")
            check_peer(connection)
            body = order(argv)
            sent = socket.send_fds(connection, [body], [0, 1, 2])
            connection.sendall(body[sent:])
            connection.shutdown(socket.SHUT_WR)
            try:
                answer = connection.recv(64)
            except TimeoutError:
                connection.shutdown(socket.SHUT_RD)  # no answer comes after this, but one may have come
                answer = connection.recv(64)
        except OSError:
            return False
        return bool(answer)


if __name__ == "__main__":
    if not run_there(sys.argv[1], sys.argv[2:]):
        os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
