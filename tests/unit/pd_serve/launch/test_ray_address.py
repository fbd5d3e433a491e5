"""An address at which no Ray cluster answers is one clear line, before Ray is asked."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pd_serve.errors import InvalidRequestError, PdServeError
from pd_serve.launch import ray_address
from pd_serve.launch.ray_address import find_ray_cluster


@pytest.fixture
def closed_address() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture(autouse=True)
def _this_machine_is_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_without_an_address_there_is_nothing_to_check() -> None:
    assert find_ray_cluster(None) is None


#: The first frame of a gRPC server.
SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


@contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """A server that answers the first bytes of a connection so; None: never."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                if answer is None:
                    done.wait()
                else:
                    connection.sendall(answer)

        done = threading.Event()
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        done.set()
        thread.join()


def test_a_server_that_answers_is_joined() -> None:
    with listening(SETTINGS) as address:
        assert find_ray_cluster(address) == address


@pytest.mark.parametrize(("answer", "says"), [(None, "timed out"), (b"", "the connection was closed")])
def test_a_listener_that_does_not_answer_is_refused(
    answer: bytes | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_address, "CONNECT_S", 0.2)

    with listening(answer) as address, pytest.raises(PdServeError, match=f"{address}.*{says}"):
        find_ray_cluster(address)


def test_an_address_without_a_listener_is_refused_with_the_reason(closed_address: str) -> None:
    with pytest.raises(PdServeError, match=f"--ray-address {closed_address} \\(.*refused"):
        find_ray_cluster(closed_address)


@pytest.mark.parametrize("address", ["here", "here:", ":6379", "here:port"])
def test_a_text_that_is_not_an_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="must be HOST:PORT, or auto"):
        find_ray_cluster(address)


def test_auto_joins_the_first_cluster_of_this_machine_that_answers(
    closed_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A noted cluster that is gone, and the private one of another service, are passed over."""
    noted = tmp_path / "ray_current_cluster"
    noted.write_text(f"{closed_address}\n")
    monkeypatch.setattr(ray_address, "CURRENT_CLUSTER", str(noted))
    with listening(SETTINGS) as address:
        raylet = SimpleNamespace(info={"cmdline": ["/ray/raylet", f"--gcs-address={address}"]})
        other = SimpleNamespace(info={"cmdline": ["grep", "--gcs-address=1.2.3.4:5"]})
        monkeypatch.setattr(psutil, "process_iter", lambda attributes: [other, raylet])

        assert find_ray_cluster("auto") == address


def test_auto_without_a_cluster_is_refused(
    closed_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "process_iter", lambda attributes: [])
    monkeypatch.setattr(ray_address, "CURRENT_CLUSTER", str(tmp_path / "none"))

    with pytest.raises(PdServeError, match=r"--ray-address auto \(none is known here\)"):
        find_ray_cluster("auto")

    monkeypatch.setenv("RAY_ADDRESS", closed_address)
    with pytest.raises(PdServeError, match=rf"--ray-address auto \({closed_address}: .*refused"):
        find_ray_cluster("auto")


def test_loopback_is_checked_at_the_address_that_ray_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")

    assert ray_address._as_ray_connects("10.0.0.7") == "10.0.0.7"
    assert ray_address._as_ray_connects("localhost") != "localhost" or not has_route()


def has_route() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return sock.connect_ex(("8.8.8.8", 53)) == 0
