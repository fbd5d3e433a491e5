"""Whether a Ray cluster answers, before Ray is asked to join it, which it tries for minutes."""

import os
import socket

import psutil

from pd_serve.errors import InvalidRequestError, PdServeError

#: Time to connect to the cluster's head, and for its first answer, in seconds each.
CONNECT_S = 5.0

#: The start of an HTTP/2 connection, which a gRPC server such as Ray's answers at once with its own settings.
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))

#: Where `ray start` notes the address of the last cluster that it has started on this machine.
CURRENT_CLUSTER = "/tmp/ray/ray_current_cluster"


def check_ray_address(address: str | None) -> None:
    """Returns if something answers at the address of `--ray-address`, or there is nothing to check.

    Raises:
        InvalidRequestError: Not an address.
        PdServeError: Nothing answers.
    """
    where = address
    if address == "auto":
        where = os.environ.get("RAY_ADDRESS") or _current_cluster()
    if where is None or where in ("auto", "local"):
        return  # Ray looks for a cluster on this machine, and fails at once if there is none
    host, _, port = where.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidRequestError(f"--ray-address {where}: must be HOST:PORT, or auto")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_S) as connection:
            if "RAY_USE_TLS" not in os.environ:
                connection.sendall(HTTP2_PREFACE)
                if not connection.recv(1):
                    raise ConnectionError("the connection was closed")
    except (OSError, OverflowError) as error:
        if address == "auto" and _runs_here():
            return  # the noted cluster is gone; Ray finds the one that runs here
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PdServeError(
            f"no Ray cluster answers at {where} (--ray-address {address}): {why};"
            " `ray start --head` starts one on this machine"
        ) from None


def _runs_here() -> bool:
    return any(process.info["name"] == "gcs_server" for process in psutil.process_iter(["name"]))


def _current_cluster() -> str | None:
    try:
        with open(CURRENT_CLUSTER, encoding="utf-8") as file:
            return file.read().strip() or None
    except OSError:
        return None
