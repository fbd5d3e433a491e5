"""An address at which no Ray cluster answers is one clear line, before Ray is asked."""

import socket
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


def test_a_listener_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        check_ray_address(f"127.0.0.1:{sock.getsockname()[1]}")


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
