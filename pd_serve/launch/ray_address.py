"""The Ray cluster to join, if it answers. Ray itself would try for minutes."""

import os
import socket
from collections.abc import Iterator

import psutil

from pd_serve.errors import InvalidRequestError, PdServeError

#: Time to connect to the cluster's head, and for its first answer, in seconds each.
CONNECT_S = 5.0

#: The start of an HTTP/2 connection, which a gRPC server such as Ray's answers at once with its own settings.
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))

#: Where `ray start` notes the address of the last cluster that it has started on this machine.
CURRENT_CLUSTER = "/tmp/ray/ray_current_cluster"


def find_ray_cluster(address: str | None) -> str | None:
    """The address of the cluster to join.

    "auto" is RAY_ADDRESS, or the first cluster of this machine that answers: not the private one of another
    `pd-serve serve`, which listens on loopback only.

    Args:
        address: That of `--ray-address`; None for a cluster of our own.

    Raises:
        InvalidRequestError: Not an address.
        PdServeError: No cluster answers.
    """
    if address is None:
        return None
    configured = os.environ.get("RAY_ADDRESS", "auto")
    candidates = [address] if address != "auto" else [configured] if configured != "auto" else list(_local())
    reasons = []
    for candidate in candidates:
        if (reason := _why_not(candidate)) is None:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise PdServeError(
        f"no Ray cluster answers at --ray-address {address} ({'; '.join(reasons) or 'none is known here'});"
        " `ray start --head` starts one on this machine"
    )


def _local() -> Iterator[str]:
    """The cluster that `ray start` has noted, then those of the raylets that run here."""
    try:
        with open(CURRENT_CLUSTER, encoding="utf-8") as file:
            noted = file.read().strip()
    except OSError:
        noted = ""
    found = {noted: None} if noted else {}
    for process in psutil.process_iter(["cmdline"]):
        arguments = " ".join(process.info["cmdline"] or ()).split()
        if arguments and arguments[0].endswith("raylet"):
            found |= {one.partition("=")[2]: None for one in arguments if one.startswith("--gcs-address=")}
    yield from found


def _why_not(address: str) -> str | None:
    """The reason why no Ray cluster answers at an address; None if one does."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidRequestError(f"--ray-address {address}: must be HOST:PORT, or auto")
    try:
        where = (_as_ray_connects(host.strip("[]")), int(port))
        with socket.create_connection(where, CONNECT_S) as connection:
            if "RAY_USE_TLS" not in os.environ:
                connection.sendall(HTTP2_PREFACE)
                if not connection.recv(1):
                    return "the connection was closed"
    except (OSError, OverflowError) as error:
        return (isinstance(error, OSError) and error.strerror) or str(error)
    return None


def _as_ray_connects(host: str) -> str:
    """Ray replaces this machine's loopback address by its own one. Source: `ray/_private/services.py`."""
    if (
        host not in ("127.0.0.1", "localhost", "::1")
        or os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == "0"
    ):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("8.8.8.8", 53))  # sends nothing
        except OSError:
            return host
        return str(sock.getsockname()[0])
