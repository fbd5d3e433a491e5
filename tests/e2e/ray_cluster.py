"""A Ray cluster under test, and Ray Serve's commands to it."""

import json
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pd_serve.platform.environment import LOOPBACK
from tests.e2e.server_process import ServerProcess
from tests.environment import START_ENVIRONMENT

#: `pd_serve.launch.ray_serve` is found from here.
ROOT = Path(__file__).parents[2]

START_S = 180.0

#: As `pd-serve serve` sets it for a Ray of its own.
ENVIRONMENT = {
    **LOOPBACK,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_worker_niceness": "0",  # Ray's 15 would have them wait for everything else on this machine
    "PYTHONPATH": str(ROOT),
}


class RayCluster(ServerProcess):
    """One node for each of `nodes`, options of Ray's; `port` is where Serve's HTTP will be."""

    def __init__(self, log: Path, *nodes: dict[str, Any]) -> None:
        self.dashboard, http = free_ports(2)
        self.environment = ENVIRONMENT | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        head = {"dashboard_host": "127.0.0.1", "dashboard_port": self.dashboard} | nodes[0]
        arguments = [json.dumps(node) for node in (head, *nodes[1:])]
        script = str(Path(__file__).with_name("local_ray.py"))
        super().__init__([sys.executable, script, *arguments], log, http, self.environment)

    def address(self) -> str:
        """Once it is there."""
        deadline = time.monotonic() + START_S
        while not (shown := re.search(r"^address (\S+)", self.log.read_text(errors="replace"), re.MULTILINE)):
            assert self.process.poll() is None, self.tail()
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.1)
        return shown[1]

    def deploy(self, config: Path) -> None:
        """Has Serve make this its configuration, as soon as Ray's dashboard answers."""
        command = [_script("serve"), "deploy", str(config), "--address", f"http://127.0.0.1:{self.dashboard}"]
        deadline = time.monotonic() + START_S
        while True:
            done = subprocess.run(
                command, env=self._environment(), capture_output=True, text=True, timeout=START_S, check=False
            )
            if done.returncode == 0:
                return
            assert time.monotonic() < deadline, done.stdout + done.stderr
            time.sleep(0.5)

    def _environment(self) -> dict[str, str]:
        return START_ENVIRONMENT | self.environment | {"RAY_ADDRESS": self.address()}

    def processes(self, title: str) -> list[psutil.Process]:
        """Ray's workers whose title has this in it."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found


@contextmanager
def ray_cluster(log: Path, *nodes: dict[str, Any]) -> Iterator[RayCluster]:
    cluster = RayCluster(log, *nodes)
    try:
        yield cluster
    finally:
        cluster.kill()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))
