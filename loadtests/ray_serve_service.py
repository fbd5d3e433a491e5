"""The service as an application of Ray Serve, on Ray nodes of its own on this machine."""

import asyncio
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.servers import HOST, free_port, script
from pd_serve.platform.environment import LOOPBACK

ENVIRONMENT = {
    **LOOPBACK,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # `ray start` asks for it before a second node on loopback
    "RAY_AUTH_MODE": "token",
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_worker_niceness": "0",  # as under `pd-serve serve`
}

#: The root of the checkout, where Serve's processes find the application.
ROOT = Path(__file__).parents[1]


def new_environment() -> dict[str, str]:
    """Environment variables of all processes of one Ray cluster, with a new token."""
    return ENVIRONMENT | {"RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": str(ROOT)}


def head_command(folder: Path, port: int, dashboard: int) -> list[str]:
    """`ray start` for a head node that ends with its process.

    Args:
        folder: Ray's temporary folder. Its path has to be short, because those of sockets are limited.
        port: Of Ray's control store.
        dashboard: Port of Ray's dashboard, to which applications are deployed.
    """
    options = {"port": port, "dashboard-host": HOST, "dashboard-port": dashboard, "temp-dir": folder}
    return [script("ray"), "start", "--head", *_node_options(None, options)]


def node_command(port: int, resources: Mapping[str, float]) -> list[str]:
    """`ray start` for a further node that ends with its process.

    Args:
        port: Of the head's control store.
        resources: Custom resources of the node.
    """
    return [script("ray"), "start", f"--address={HOST}:{port}", *_node_options(resources, {})]


def _node_options(resources: Mapping[str, float] | None, options: dict[str, Any]) -> list[str]:
    common = {"node-ip-address": HOST, "num-cpus": 4, "object-store-memory": 80 * 2**20}
    common |= {"dashboard-agent-listen-port": free_port()}
    named = {"resources": json.dumps(dict(resources))} if resources else {}
    return ["--block", *(f"--{name}={value}" for name, value in (common | named | options).items())]


def write_config(
    folder: Path, port: int, arguments: Mapping[str, Any], import_path: str, *, haproxy: bool = True
) -> Path:
    """Writes a Serve configuration like deploy/serve.yaml.

    Args:
        port: Of the service.
        arguments: Those of the application.
        import_path: Of the function that builds the application.
    """
    application = {
        "name": "pd-serve",
        "route_prefix": "/",
        "import_path": import_path,
        "args": dict(arguments),
    }
    variables = {"RAY_SERVE_ENABLE_HA_PROXY": str(int(haproxy))}
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": HOST, "port": port},
        "controller_options": {"runtime_env": {"env_vars": variables}},
        "applications": [application],
    }
    path = folder / "serve.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


async def deploy(config: Path, dashboard: int, environment: Mapping[str, str]) -> None:
    """Deploys the application, and tries again until Ray answers; cancelled when its server ends."""
    command: Sequence[str] = [
        script("serve"),
        "deploy",
        str(config),
        "--address",
        f"http://{HOST}:{dashboard}",
    ]
    while True:
        await asyncio.sleep(1)
        process = await asyncio.create_subprocess_exec(
            *command,
            env=os.environ | environment,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        if await process.wait() == 0:
            return
