"""What `pd-serve bench compare` sets side by side: command lines of ours, vLLM's servers and public routers.

An arm is a way to serve a model with a number of engines: processes with engines, and for the peers a router
in front of them. All engines have the same flags, environment and number of threads.
"""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from loadtests.bench.servers import MODEL, OURS, STOCK, Command, Settings

PLAIN, NIXL, UNMOVED, DEFAULTS = "round-robin", "nixl", "ours-unmoved", "ours"

TITLES = {
    PLAIN: "plain vLLM, round robin",
    NIXL: "vLLM, NixlConnector",
    UNMOVED: "ours, no rescheduling",
    DEFAULTS: "ours",
}

HOST = "127.0.0.1"

OURS_SCRIPT = str(Path(sys.executable).with_name("pd-serve"))

#: What routers print of each request, they do not have to here.
QUIET = "--log-level=error"


@dataclass(frozen=True, slots=True)
class Process:
    """Attributes:
    environment: Beside that of all engines.
    """

    name: str
    command: list[str]
    port: int
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def as_command(self, settings: Settings) -> Command:
        return self.name, self.command, self.port, settings.environment | self.environment


@dataclass(frozen=True, slots=True)
class Arm:
    """Attributes:
    engines: Started first, all at a time.
    front: Started when they are up; where clients send requests.
    """

    name: str
    engines: list[Process]
    front: Process | None = None

    @property
    def processes(self) -> list[Process]:
        return [*self.engines, *([self.front] if self.front else [])]


@dataclass(frozen=True, slots=True)
class Peers:
    """The routers' own environment.

    Attributes:
        free_port: Gives another free port each time.
    """

    folder: Path
    free_port: Callable[[], int]

    def vllm_router(self, flags: Iterable[str]) -> Process:
        port = self.free_port()
        flags = [*flags, f"--host={HOST}", f"--port={port}", *self._metrics(), QUIET]
        return Process("vllm-router", [str(self.folder / "bin" / "vllm-router"), *flags], port, {})

    def sglang_router(self, flags: Iterable[str]) -> Process:
        port = self.free_port()
        command = [str(self.folder / "bin" / "python"), "-m", "sglang_router.launch_router"]
        flags = [*flags, f"--host={HOST}", f"--port={port}", *self._metrics(), QUIET]
        return Process("sglang-router", [*command, *flags], port, {})

    def _metrics(self) -> list[str]:
        return [f"--prometheus-host={HOST}", f"--prometheus-port={self.free_port()}"]


def arms(num_engines: int, settings: Settings, peers: Peers) -> list[Arm]:
    """All four, each with `num_engines` engines; where it is disaggregated, one of them prefills."""
    return [
        plain(num_engines, settings, peers),
        disaggregated(num_engines, settings, peers),
        ours(UNMOVED, num_engines, settings, peers, ["--set=rescheduling=none"]),
        ours(DEFAULTS, num_engines, settings, peers, []),
    ]


def plain(num_engines: int, settings: Settings, peers: Peers) -> Arm:
    """vLLM's servers, each with its own engine, in turns."""
    servers = [_vllm_server(f"vllm-{i}", settings, peers) for i in range(num_engines)]
    urls = [server.url for server in servers]
    return Arm(PLAIN, servers, peers.vllm_router(["--policy=round_robin", "--worker-urls", *urls]))


def disaggregated(num_engines: int, settings: Settings, peers: Peers) -> Arm:
    """vLLM's own disaggregation: the router sends a prompt to one server, and then to another."""
    prefill = _vllm_server("prefill-0", settings, peers, "kv_producer")
    decode = [_vllm_server(f"decode-{i}", settings, peers, "kv_consumer") for i in range(num_engines - 1)]
    flags = ["--vllm-pd-disaggregation", f"--prefill={prefill.url}"]
    flags += [f"--decode={server.url}" for server in decode]
    flags.append("--policy=round_robin")
    if len(decode) > 1:
        flags.append("--decode-policy=power_of_two")  # aware of the load; refused for a single one
    return Arm(NIXL, [prefill, *decode], peers.vllm_router(flags))


def ours(name: str, num_engines: int, settings: Settings, peers: Peers, flags: list[str]) -> Arm:
    """`pd-serve serve`, which has its own front end."""
    port = peers.free_port()
    roles = ["--prefill=1", f"--decode={num_engines - 1}"]
    flags = [f"--served-model-name={MODEL}", f"--host={HOST}", f"--port={port}", *flags, *settings.flags]
    return Arm(name, [Process(OURS, [OURS_SCRIPT, "serve", settings.model, *roles, *flags], port, {})])


def shown(process: Process, settings: Settings) -> dict[str, object]:
    """For the report: without paths of this machine."""

    def bare(text: str) -> str:
        return Path(text).name if text.startswith("/") else text

    command = " ".join(bare(part.replace(settings.model, MODEL)) for part in process.command)
    environment = {name: bare(value) for name, value in process.environment.items()}
    return {"name": process.name, "command": command, "environment": environment}


def _vllm_server(name: str, settings: Settings, peers: Peers, kv_role: str | None = None) -> Process:
    port = peers.free_port()
    command, environment = settings.command(STOCK, port), {}
    if kv_role is not None:
        transfer = {"kv_connector": "NixlConnector", "kv_role": kv_role, "kv_buffer_device": "cpu"}
        command = [*command, f"--kv-transfer-config={json.dumps(transfer, separators=(',', ':'))}"]
        # Its default, localhost, may be IPv6, where it does not listen.
        environment = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": HOST,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(peers.free_port()),
        }
    return Process(name, command, port, environment)
