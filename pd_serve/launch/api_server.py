"""One API server: the application, and behind it the request router and the link to the instances' owner."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from pd_serve.comm.wire import Wire
from pd_serve.config import ServeConfig

#: Instances beyond those asked for at the start that vLLM's metrics can tell apart.
SPARE_SLOTS = 4


class ApiServer:
    """Lives on one event loop, until `close`.

    Args:
        wire: Closed by `close`.
        find_owner: Gives the address of the owner; see `OwnerLink`.
        flags: From `pd_serve.launch.preparation.parse`.
        engine_config: vLLM's resolved configuration of an instance.

    Attributes:
        app: The FastAPI application, once `start` has returned. So `router` and `client`.
    """

    def __init__(
        self,
        config: ServeConfig,
        wire: Wire,
        find_manager: Callable[[], Awaitable[str]],
        flags: Any,
        engine_config: Any,
    ) -> None:
        from pd_serve.manager.manager_link import ManagerClient

        self._config = config
        self._wire = wire
        self._server = flags.server
        self._engine_config = engine_config
        self._link = ManagerClient(wire, find_manager)
        self.app: Any = None
        self.router: Any = None
        self.client: Any = None
        self._live: Any = None

    async def start(self) -> None:
        """Returns when there are instances, and all of them have reported."""
        from pd_serve.api.app import create_app
        from pd_serve.api.codec import VllmCodec
        from pd_serve.api.core import ClusterCore
        from pd_serve.api.engine_client import ClusterAsyncLLM
        from pd_serve.dashboard.live_view import LiveView
        from pd_serve.dashboard.recent import RecentEvents
        from pd_serve.dashboard.routes import show_dashboard
        from pd_serve.frontend.request_tracker import RequestTracker
        from pd_serve.observe.exposition import show_metrics
        from pd_serve.observe.setup import make_recorder
        from router.dispatcher import Dispatcher

        config = self._config
        infos = await self._link.instances()
        # What an instance found out when it made its KV cache, as vLLM's own front end takes it over.
        self._engine_config.cache_config.num_gpu_blocks = infos[0].num_blocks
        self._engine_config.cache_config.block_size = infos[0].block_tokens
        lengths = [info.max_model_len for info in infos]
        if config.simulated is not None and (given := self._server.max_model_len or 0) > 0:
            lengths.append(given)  # a simulated engine has no limit but its memory
        self._engine_config.model_config.max_model_len = min(lengths)
        codec = VllmCodec()
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        recent = RecentEvents()
        self.router = RequestTracker(
            self._wire.name,
            self._wire,
            codec,
            outputs.put_nowait,
            block_tokens=infos[0].block_tokens,
            num_slots=config.max_instances + SPARE_SLOTS,
            owns=False,
            recorder=make_recorder(
                recent,
                log_requests=self._server.enable_log_requests,
                traced=self._server.otlp_traces_endpoint is not None,
            ),
            dispatcher=Dispatcher(config.policies, clock=asyncio.get_running_loop().time),
        )
        self._link.attach(self.router)
        async with asyncio.timeout(30):
            await self.router.wait_for_reports()
        core = ClusterCore(self.router, outputs, codec, tuple(infos[0].supported_tasks))
        check: Any = None
        if config.simulated is not None:
            from pd_serve.simulated_engine.vllm_format import check_parameters

            check = check_parameters
        self.client = ClusterAsyncLLM(
            self._engine_config,
            core,
            log_requests=self._server.enable_log_requests,
            log_stats=not self._server.disable_log_stats,
            check=check,
        )
        self._link.internal_ids = self.client.internal_ids
        self.app = await create_app(
            self._server,
            self.client,
            self._link,
            max_waiting=config.max_waiting,
            admin_key=config.admin_key,
            max_body_bytes=config.max_body_bytes,
        )
        show_metrics(self.app, self.router.reports)
        self._live = LiveView(self._wire.name, self._link.snapshot, self.router.instances, recent)
        show_dashboard(self.app, self._live)

    async def close(self) -> None:
        if self._live is not None:
            await self._live.close()
        await self._link.close()
        if self.router is not None:
            await self.router.close()
        await self._wire.close()


def import_all() -> None:
    """What `FrontEnd.start` imports: seconds, for a thread while others start."""
    import pd_serve.api.app
    import pd_serve.api.codec
    import pd_serve.api.core
    import pd_serve.frontend.request_tracker  # noqa: F401
