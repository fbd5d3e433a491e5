"""The arms of `bench compare`: command lines of pd-serve, vLLM's servers and public routers.

An arm is a way to serve a model with a number of engines: processes with engines, and a router in front of
vLLM's servers. All engines have the same flags, environment and number of threads.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from loadtests.servers import HOST, MODEL, ServerCommand, SharedSettings

PLAIN, CACHE_AWARE, DATA_PARALLEL = "round-robin", "cache-aware", "data-parallel"
NIXL, RAY_LLM = "nixl", "ray-llm"
UNMOVED, DEFAULTS, CONDITIONAL = "ours-unmoved", "ours", "ours-conditional"

TITLES = {
    PLAIN: "plain vLLM, round robin",
    CACHE_AWARE: "plain vLLM, by cached prefix",
    DATA_PARALLEL: "vLLM, data parallel",
    NIXL: "vLLM, NixlConnector",
    RAY_LLM: "Ray Serve LLM, disaggregated",
    UNMOVED: "ours, no rescheduling",
    DEFAULTS: "ours",
    CONDITIONAL: "ours, conditional",
}

#: Routers do not print a line for each request.
QUIET = "--log-level=error"


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to serve the model.

    Attributes:
        engines: Started first, all together.
        router: Started when the engines are ready. Clients send to it, or to the only engine process.
    """

    name: str
    engines: list[ServerCommand]
    router: ServerCommand | None = None

    @property
    def processes(self) -> list[ServerCommand]:
        return [*self.engines, *([self.router] if self.router else [])]


@dataclass(frozen=True, slots=True)
class ArmBuilder:
    """Builds the arms.

    Attributes:
        settings: Of all engines.
        routers_folder: The Python environment of the public routers.
        free_port: Returns another free port each time.
    """

    settings: SharedSettings
    routers_folder: Path
    free_port: Callable[[], int]

    def all_arms(self, num_engines: int) -> list[Arm]:
        """All arms with `num_engines` engines; a disaggregated arm has one prefill engine."""
        return [
            self._plain(PLAIN, num_engines, "round_robin"),
            self._plain(CACHE_AWARE, num_engines, "cache_aware"),
            self._data_parallel(num_engines),
            self._nixl(num_engines),
            self._ray_llm(num_engines),
            self._ours(UNMOVED, num_engines, "--set=rescheduling=none"),
            self._ours(DEFAULTS, num_engines),
            self._ours(CONDITIONAL, num_engines, "--policy=conditional"),
        ]

    def vllm_router(self, flags: Iterable[str]) -> ServerCommand:
        """vLLM's public router."""
        return self._router("vllm-router", [str(self.routers_folder / "bin" / "vllm-router")], flags)

    def sglang_router(self, flags: Iterable[str]) -> ServerCommand:
        """SGLang's public router."""
        python = str(self.routers_folder / "bin" / "python")
        return self._router("sglang-router", [python, "-m", "sglang_router.launch_router"], flags)

    def _plain(self, name: str, num_engines: int, policy: str) -> Arm:
        """vLLM's servers, each with its own engine, behind a policy of vLLM's router."""
        servers = [self.settings.stock(self.free_port(), name=f"vllm-{i}") for i in range(num_engines)]
        urls = [server.url for server in servers]
        return Arm(name, servers, self.vllm_router([f"--policy={policy}", "--worker-urls", *urls]))

    def _data_parallel(self, num_engines: int) -> Arm:
        """vLLM's own front end of several engines, with two API servers."""
        flags = (f"--data-parallel-size={num_engines}", "--api-server-count=2")
        return Arm(DATA_PARALLEL, [self.settings.vllm_serve(self.free_port(), *flags, name="vllm")])

    def _nixl(self, num_engines: int) -> Arm:
        """vLLM's own disaggregation: the router sends a prompt to one server, and then to another."""
        prefill = self._nixl_server("prefill-0", "kv_producer")
        decode = [self._nixl_server(f"decode-{i}", "kv_consumer") for i in range(num_engines - 1)]
        flags = ["--vllm-pd-disaggregation", f"--prefill={prefill.url}"]
        flags += [f"--decode={server.url}" for server in decode]
        flags.append("--policy=round_robin")
        if len(decode) > 1:
            flags.append("--decode-policy=power_of_two")  # considers the load; refused for a single server
        return Arm(NIXL, [prefill, *decode], self.vllm_router(flags))

    def _ray_llm(self, num_engines: int) -> Arm:
        """Ray Serve's deployment of vLLM with the NixlConnector, whose own proxy clients send to."""
        flags = (f"--decode={num_engines - 1}",)
        server = self.settings.from_module(
            "loadtests.bench.ray_llm_app", self.free_port(), *flags, name=RAY_LLM
        )
        # The packages that only Ray's LLM library needs.
        extra = {"PYTHONPATH": str(self.routers_folder / "ray-llm"), "VLLM_NIXL_SIDE_CHANNEL_HOST": HOST}
        environment = {**server.environment, **extra, "UCX_NET_DEVICES": "lo"}
        return Arm(RAY_LLM, [replace(server, environment=environment, ready_path="/v1/models")])

    def _ours(self, name: str, num_engines: int, *flags: str) -> Arm:
        """`pd-serve serve`, which needs no router."""
        roles = {"prefill": 1, "decode": num_engines - 1}
        return Arm(name, [self.settings.ours(roles, self.free_port(), *flags)])

    def _nixl_server(self, name: str, kv_role: str) -> ServerCommand:
        transfer = {"kv_connector": "NixlConnector", "kv_role": kv_role, "kv_buffer_device": "cpu"}
        flag = f"--kv-transfer-config={json.dumps(transfer, separators=(',', ':'))}"
        server = self.settings.stock(self.free_port(), flag, name=name)
        # The default, localhost, may be IPv6, on which NIXL does not listen.
        channel = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": HOST,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self.free_port()),
        }
        return replace(server, environment={**server.environment, **channel})

    def _router(self, name: str, command: list[str], flags: Iterable[str]) -> ServerCommand:
        port = self.free_port()
        metrics = [f"--prometheus-host={HOST}", f"--prometheus-port={self.free_port()}"]
        command = [*command, *flags, f"--host={HOST}", f"--port={port}", *metrics, QUIET]
        return ServerCommand(name, command, port, self.settings.environment)


def described(process: ServerCommand, settings: SharedSettings) -> dict[str, object]:
    """A process for the report: no paths of this machine, and only its own environment variables."""

    def without_folder(text: str) -> str:
        return Path(text).name if text.startswith("/") else text

    command = " ".join(without_folder(part.replace(settings.model, MODEL)) for part in process.command)
    environment = {
        name: without_folder(value)
        for name, value in process.environment.items()
        if name not in settings.environment
    }
    return {"name": process.name, "command": command, "environment": environment}
