"""The service as a Ray Serve application: API servers as replicas, the owner of the instances beside them.

    serve run pd_serve.launch.ray_serve:build model=tiny prefill=1 decode=2
    serve deploy deploy/serve.yaml

Requests reach an API server through Serve; from there on it is as under `pd-serve serve`: tokens and KV
blocks never cross Serve, or Ray.
"""

import asyncio
import hashlib
import logging
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from uuid import uuid4

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from pd_serve.comm.wire import CurveKeys, Wire, is_local
from pd_serve.config import DEFAULT_COST_MODEL, DEFAULT_POLICY, MAX_BODY_BYTES, ServeConfig, serve_config
from pd_serve.errors import EngineDeadError
from pd_serve.launch.api_server import ApiServer, import_all
from pd_serve.launch.credentials import read_admin_key, read_api_keys, read_cluster_secret
from pd_serve.launch.preparation import find_model, parse
from pd_serve.manager.manager import Manager, ManagerConfig
from pd_serve.manager.ray_launcher import RayLauncher
from pd_serve.observe.logs import configure_logging
from router.load import ROLES

logger = logging.getLogger(__name__)

#: Requests that Serve lets into one API server, which has bounds of its own: see `max_waiting_requests`.
MAX_ONGOING_REQUESTS = 10_000

#: Serve has a header X-Request-Id of its own in every answer, with the same id.
REQUEST_ID_FLAG = "--no-enable-request-id-headers"

#: How often Serve looks whether replicas are alive: a dead owner or API server is back so much later.
HEALTH_PERIOD_S = 2.0


class Arguments(BaseModel):
    """The flags of `pd-serve serve` under their names.

    `serve run pd_serve.launch.ray_serve:build` takes them as NAME=VALUE, a YAML file as `args`.

    Attributes:
        api_servers: Number of API servers.
        set: Settings of the policy, "KEY=VALUE KEY=VALUE".
        flags: Engine and server flags of vLLM, as on a command line.
        api_key_file, admin_key_file, cluster_secret_file: Read where the application is built.
        prefill_resources, decode_resources, neutral_resources: Custom resources of Ray, as JSON.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "smollm2"
    prefill: int | None = None
    decode: int | None = None
    neutral: int | None = None
    api_servers: int = Field(1, ge=1)
    policy: str = DEFAULT_POLICY
    set: str = ""
    autoscale_prefill: str | None = None
    autoscale_decode: str | None = None
    autoscale: str | None = None
    engine: Literal["vllm", "simulated"] = "vllm"
    cost_model: str = DEFAULT_COST_MODEL
    served_model_name: str | None = None
    api_key_file: str | None = None
    admin_key_file: str | None = None
    cluster_secret_file: str | None = None
    max_waiting_requests: int = 512
    max_body_bytes: int = MAX_BODY_BYTES
    replace: bool = True
    prefill_resources: str | None = None
    decode_resources: str | None = None
    neutral_resources: str | None = None
    accelerator_type: str | None = None
    flags: str = ""

    def config(self) -> ServeConfig:
        """Raises: InvalidRequestError."""
        own = ("api_servers", "set", "flags", "api_key_file", "admin_key_file", "cluster_secret_file")
        values = {name: value for name, value in self if name not in own}
        return serve_config(
            **values,
            settings=self.set.split(),
            engine_flags=[REQUEST_ID_FLAG, *shlex.split(self.flags)],
            ray_address="auto",
            api_keys=read_api_keys([], _path(self.api_key_file), logger.warning),
            admin_key=read_admin_key(None, _path(self.admin_key_file), logger.warning),
            cluster_secret=read_cluster_secret(_path(self.cluster_secret_file), logger.warning),
        )


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def build(args: Arguments) -> Application:
    """The application. Reads vLLM's flags, so that what is wrong with them is said here.

    Raises:
        InvalidRequestError: With one line that says what to change.
    """
    config = args.config()
    model, environment = find_model(config)
    prepared = parse(config, model, environment)
    address = str(ray.util.get_node_ip_address())
    keys = CurveKeys.of(config.cluster_secret)
    actor_options = {"num_cpus": 0, "runtime_env": {"env_vars": environment}}
    made_of = f"{args.model_dump_json()}{keys.public!r}"
    version = hashlib.sha256(made_of.encode()).hexdigest()[:8]
    owners = InstanceManager.options(ray_actor_options=actor_options)  # type: ignore[attr-defined]
    servers = ApiServerDeployment.options(  # type: ignore[attr-defined]
        num_replicas=args.api_servers, ray_actor_options=actor_options
    )
    owner = owners.bind(prepared.manager_config(address, keys), version)
    app: Application = servers.bind(config, address, keys, owner)
    return app


class LogNotice:
    """Steps and warnings as lines of log."""

    def step(self, text: str) -> None:
        logger.info("%s", text)

    def warn(self, text: str) -> None:
        logger.warning("%s", text)


@serve.deployment(num_replicas=1, health_check_period_s=HEALTH_PERIOD_S)
class InstanceManager:
    """Starts, keeps and ends the instances and the scheduler. They are actors with names, which outlive it:
    Serve starts another owner when it dies, and that one finds them.

    Args:
        version: Of the application. A newer one's owner, which comes while this one still ends, leaves these
            instances alone.
    """

    async def __init__(self, config: ManagerConfig, version: str) -> None:  # type: ignore[misc]
        configure_logging("owner")
        service = f"{serve.get_replica_context().app_name}:{version}"
        self._cluster = RayLauncher("auto", config.environment, service=service)
        self._owner = Manager(config, self._cluster, LogNotice())
        if not await self._owner.take_over():
            names = [(f"{role}-{n}", role) for role in ROLES for n in range(config.instances[role])]
            await self._owner.start(names)

    async def address(self) -> str:
        """Where API servers reach it."""
        return self._owner.address

    async def __del__(self) -> None:
        """The application is deleted."""
        await self._owner.close()
        await self._cluster.stop()


@serve.deployment(
    name="ApiServer", max_ongoing_requests=MAX_ONGOING_REQUESTS, health_check_period_s=HEALTH_PERIOD_S
)
@serve.ingress()
class ApiServerDeployment:
    """One API server. Each has its own requests and its own waiting line."""

    async def __init__(  # type: ignore[misc]
        self, config: ServeConfig, host: str, keys: CurveKeys, owner: DeploymentHandle
    ) -> None:
        configure_logging("api")
        model, environment = await asyncio.to_thread(find_model, config)
        prepared = await asyncio.to_thread(parse, config, model, environment)
        await asyncio.to_thread(import_all)

        async def find_manager() -> str:
            try:
                return str(await owner.address.remote())
            except ray.exceptions.RayError as error:
                raise EngineDeadError(f"no owner: {error}") from error

        own = host if is_local(host) else str(ray.util.get_node_ip_address())
        wire = Wire(f"api-{uuid4().hex[:8]}", own, keys)
        self._front_end = ApiServer(config, wire, find_manager, prepared.flags, prepared.engine_config)
        await self._front_end.start()
        # vLLM's error handlers tell their server to end when the engine client is dead; here Serve looks.
        self._front_end.app.state.server = SimpleNamespace(should_exit=False)

    def __serve_build_asgi_app__(self) -> Any:
        return self._front_end.app

    async def check_health(self) -> None:
        """Another replica takes its place if its engine client has stopped. Raises: RuntimeError."""
        if self._front_end.client.errored:
            raise RuntimeError("the engine client has stopped")

    async def __del__(self) -> None:
        await self._front_end.client.abort_all()
        await self._front_end.close()
