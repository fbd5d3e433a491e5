"""An address at which no Ray cluster answers is one clear line, before Ray is asked."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pd_serve.errors import InvalidRequestError, PdServeError
from pd_serve.launch import ray_address
from pd_serve.launch.ray_address import check_ray_address


@pytest.fixture
def closed_address() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


def test_without_an_address_there_is_nothing_to_check() -> None:
    check_ray_address(None)


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


def test_a_server_that_answers_is_accepted() -> None:
    with listening(bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))) as address:
        check_ray_address(address)


@pytest.mark.parametrize(("answer", "says"), [(None, "timed out"), (b"", "the connection was closed")])
def test_a_listener_that_does_not_answer_is_refused(
    answer: bytes | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_address, "CONNECT_S", 0.2)

    with listening(answer) as address, pytest.raises(PdServeError, match=f"{address}.*{says}"):
        check_ray_address(address)


def test_an_address_without_a_listener_is_refused_with_the_reason(closed_address: str) -> None:
    with pytest.raises(PdServeError, match=f"no Ray cluster answers at {closed_address}.*refused"):
        check_ray_address(closed_address)


@pytest.mark.parametrize("address", ["here", "here:", ":6379", "here:port"])
def test_a_text_that_is_not_an_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="must be HOST:PORT, or auto"):
        check_ray_address(address)


def test_auto_checks_the_cluster_that_ray_has_noted(
    closed_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = tmp_path / "ray_current_cluster"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_address, "CURRENT_CLUSTER", str(noted))
    monkeypatch.setattr(ray_address, "_runs_here", lambda: False)
    check_ray_address("auto")  # nothing noted: left to Ray

    noted.write_text(f"{closed_address}\n")

    with pytest.raises(PdServeError, match=f"answers at {closed_address} \\(--ray-address auto\\)"):
        check_ray_address("auto")
