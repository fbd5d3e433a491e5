"""The service as a Ray Serve application: API servers as replicas, the manager of the instances beside them.

    serve run pd_serve.launch.ray_serve:build model=tiny prefill=1 decode=2
    serve deploy deploy/serve.yaml

Requests reach an API server through Serve; from there on it is as under `pd-serve serve`: tokens and KV
blocks never cross Serve, or Ray.
"""

import asyncio
import hashlib
import logging
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import ray
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from pd_serve.comm.membership import MANAGER
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.config import ServeConfig
from pd_serve.errors import EngineDeadError
from pd_serve.launch.api_server import ApiServer, import_api_modules
from pd_serve.launch.console import LogProgress
from pd_serve.launch.credentials import with_credentials
from pd_serve.launch.engine_flags import refuse_own
from pd_serve.launch.preparation import find_model, parse
from pd_serve.manager.manager import Manager
from pd_serve.manager.manager_config import ManagerConfig
from pd_serve.manager.ray_actors import own_address
from pd_serve.manager.ray_launcher import RayLauncher
from pd_serve.observe.logs import configure_logging

logger = logging.getLogger(__name__)

#: Requests that Serve lets into one API server, which has bounds of its own: see `max_waiting_requests`.
MAX_ONGOING_REQUESTS = 10_000

#: Serve has a header X-Request-Id of its own in every answer, with the same id.
REQUEST_ID_FLAG = "--no-enable-request-id-headers"

REPLACED = "the application has been replaced by one with other engines"

#: Interval of Serve's health checks in seconds. A dead manager or API server is replaced after it.
HEALTH_PERIOD_S = 2.0


def serve_config(arguments: dict[str, Any]) -> ServeConfig:
    """The settings from an application's arguments. Raises: InvalidRequestError."""
    config = ServeConfig.of_ray_serve(arguments)
    refuse_own(config.flags)
    config = config.model_copy(update={"flags": (REQUEST_ID_FLAG, *config.flags)})
    return with_credentials(config, logger.warning)


def build(arguments: dict[str, Any]) -> Application:
    """The application. Parses vLLM's flags, so that an error in them is raised here.

    The environment of this process gets what vLLM reads, and nothing that Ray reads: Ray has been imported.

    Args:
        arguments: The flags of `pd-serve serve` without their dashes; vLLM's in one text as `flags`, and
            `api_servers`, the number of API servers. Files of keys are read where the application is built.

    Raises:
        InvalidRequestError: With one line that says what to change.
    """
    config = serve_config(arguments)
    model = find_model(config)
    prepared = parse(config, model)
    address = str(ray.util.get_node_ip_address())
    keys = CurveKeys.of(config.cluster_secret)
    actor_options = {"num_cpus": 0, "runtime_env": {"env_vars": model.environment}}
    made_of = f"{config!r}{keys.public!r}"
    version, engines = _short_hash(made_of), engines_of(config, keys)
    managers = InstanceManager.options(ray_actor_options=actor_options)  # type: ignore[attr-defined]
    servers = ApiServerDeployment.options(  # type: ignore[attr-defined]
        num_replicas=config.api_servers or 1, ray_actor_options=actor_options
    )
    manager = managers.bind(prepared.manager_config(address, keys), version, engines)
    app: Application = servers.bind(config, address, keys, manager)
    return app


def engines_of(config: ServeConfig, keys: CurveKeys) -> str:
    """A hash that is equal for two applications if API servers of one can use the instances of the other.

    Serve replaces the manager of an application that is deployed again before its API servers.
    """
    return _short_hash(
        f"{config.model!r}{config.engine!r}{config.cost_model!r}{config.flags!r}{keys.public!r}"
    )


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@serve.deployment(num_replicas=1, health_check_period_s=HEALTH_PERIOD_S)
class InstanceManager:
    """Starts, keeps and ends the instances and the scheduler.

    They are actors with names, which outlive it: Serve starts another manager when it dies, which finds them.

    Args:
        version: Of the application. The manager of a newer version, which starts while this one still ends,
            leaves these instances alone.
        engines: See `engines_of`.
    """

    async def __init__(self, config: ManagerConfig, version: str, engines: str) -> None:  # type: ignore[misc]
        configure_logging(MANAGER)
        self._engines = engines
        service = f"{serve.get_replica_context().app_name}:{version}"
        self._launcher = RayLauncher(
            "auto",
            config.environment,
            service=service,
            instances_per_process=config.instances_per_process,
        )
        wire = Wire(MANAGER, own_address(config.host), config.keys)
        self._manager = Manager(config, wire, self._launcher, LogProgress())
        if not await self._manager.take_over():
            await self._manager.start()

    async def address(self, engines: str) -> str | None:
        """Its address for API servers; None for those that cannot use its instances."""
        return self._manager.address if engines == self._engines else None

    async def check_health(self) -> None:
        """Serve replaces this replica if another manager has taken over. Raises: RuntimeError."""
        if self._manager.is_superseded:
            raise RuntimeError("another manager has taken over")

    async def __del__(self) -> None:
        """The application is deleted, or another manager has taken the instances over."""
        if await self._manager.keep_notes():
            await self._manager.close()
            await self._launcher.stop()


@serve.deployment(
    name="ApiServer", max_ongoing_requests=MAX_ONGOING_REQUESTS, health_check_period_s=HEALTH_PERIOD_S
)
@serve.ingress()
class ApiServerDeployment:
    """One API server. It has its own requests and its own waiting line."""

    async def __init__(  # type: ignore[misc]
        self, config: ServeConfig, host: str, keys: CurveKeys, manager: DeploymentHandle
    ) -> None:
        name = f"api-{uuid4().hex[:8]}"
        configure_logging(name)
        self._managers, self._engines = manager, engines_of(config, keys)
        self._is_replaced = False
        model = await asyncio.to_thread(find_model, config)
        prepared = await asyncio.to_thread(parse, config, model)
        await asyncio.to_thread(import_api_modules)

        wire = Wire(name, own_address(host), keys)
        self._api = await ApiServer.start(prepared, wire, self._find_manager)
        # vLLM's error handlers end their server when the engine client is dead; here the health check does.
        self._api.app.state.server = SimpleNamespace(should_exit=False)

    async def _find_manager(self) -> str:
        """The manager's address. Raises: EngineDeadError: There is none that this API server can use."""
        try:
            address = await self._managers.address.remote(self._engines)
        except ray.exceptions.RayError as error:
            raise EngineDeadError(f"no manager: {error}") from error
        self._is_replaced = address is None
        if address is None:
            raise EngineDeadError(REPLACED)
        return str(address)

    def __serve_build_asgi_app__(self) -> Any:
        return self._api.app

    async def check_health(self) -> None:
        """Serve replaces this replica if it serves no requests any more. Raises: RuntimeError."""
        if self._api.client.errored:
            raise RuntimeError("the engine client has stopped")
        if self._is_replaced:
            await self._api.end_requests(REPLACED)  # Serve waits for streams to end
            raise RuntimeError(REPLACED)

    async def __del__(self) -> None:
        await self._api.client.abort_all()
        await self._api.close()
