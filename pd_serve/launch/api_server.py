"""One API server: the HTTP application, the requests behind it, and the connection to the manager."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Self

from pd_serve.comm.wire import Wire
from pd_serve.config import ServeConfig
from pd_serve.launch.preparation import Prepared

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pd_serve.api.engine_client import ClusterAsyncLLM
    from pd_serve.frontend.request_tracker import RequestTracker

#: Instances beyond the number at the start that vLLM's metrics can tell apart.
SPARE_SLOTS = 4

#: Time for all instances to report, in seconds.
REPORTS_S = 30.0


class ApiServer:
    """Made by `start`; runs on one event loop, until `close`.

    Attributes:
        app: The FastAPI application.
        tracker: The requests of this server.
        client: vLLM's engine client, over the cluster.
    """

    def __init__(
        self, app: "FastAPI", tracker: "RequestTracker", client: "ClusterAsyncLLM", stack: AsyncExitStack
    ) -> None:
        self.app = app
        self.tracker = tracker
        self.client = client
        self._stack = stack

    @classmethod
    async def start(cls, prepared: Prepared, wire: Wire, find_manager: Callable[[], Awaitable[str]]) -> Self:
        """Returns when there are instances, and all of them have reported.

        Args:
            wire: Closed by `close`, or when the start fails.
            find_manager: Returns the address of the manager; see `ManagerClient`.
        """
        from pd_serve.api.app import create_app
        from pd_serve.api.codec import VllmCodec
        from pd_serve.api.core import ClusterCore
        from pd_serve.api.engine_client import ClusterAsyncLLM
        from pd_serve.dashboard.live_view import LiveView
        from pd_serve.dashboard.recent import RecentEvents
        from pd_serve.dashboard.routes import show_dashboard
        from pd_serve.frontend.request_tracker import RequestTracker
        from pd_serve.manager.manager_link import ManagerClient
        from pd_serve.observe.exposition import show_metrics
        from pd_serve.observe.setup import make_recorder
        from router.dispatcher import Dispatcher

        config, server, engine_config = prepared.config, prepared.flags.server, prepared.engine_config
        async with AsyncExitStack() as stack:
            stack.push_async_callback(wire.close)
            manager = ManagerClient(wire, find_manager)
            stack.push_async_callback(manager.close)
            infos = await manager.instances()
            # What an instance found out when it made its KV cache, as vLLM's own front end takes it over.
            engine_config.cache_config.num_gpu_blocks = infos[0].num_blocks
            engine_config.cache_config.block_size = infos[0].block_tokens
            engine_config.model_config.max_model_len = _max_model_len(config, server, infos)
            codec = VllmCodec()
            outputs: asyncio.Queue[Any] = asyncio.Queue()
            recent = RecentEvents()
            tracker = RequestTracker(
                wire.name,
                wire,
                codec,
                outputs.put_nowait,
                block_tokens=infos[0].block_tokens,
                num_slots=config.max_instances + SPARE_SLOTS,
                owns=False,
                recorder=make_recorder(
                    recent,
                    log_requests=server.enable_log_requests,
                    traced=server.otlp_traces_endpoint is not None,
                ),
                dispatcher=Dispatcher(config.policies, clock=asyncio.get_running_loop().time),
            )
            stack.push_async_callback(tracker.close)
            stack.push_async_callback(manager.close)  # again: before the tracker, which it calls
            manager.attach(tracker)
            async with asyncio.timeout(REPORTS_S):
                await tracker.wait_for_reports()
            core = ClusterCore(tracker, outputs, codec, tuple(infos[0].supported_tasks))
            check: Any = None
            if config.engine == "simulated":
                from pd_serve.simulated_engine.vllm_format import check_parameters

                check = check_parameters
            client = ClusterAsyncLLM(
                engine_config,
                core,
                log_requests=server.enable_log_requests,
                log_stats=not server.disable_log_stats,
                check=check,
            )
            manager.internal_ids = client.internal_ids
            app = await create_app(
                server,
                client,
                manager,
                max_waiting=config.max_waiting_requests,
                admin_key=config.admin_key,
                max_body_bytes=config.max_body_bytes,
            )
            show_metrics(app, tracker.reports)
            live = LiveView(wire.name, manager.snapshot, tracker.instances, recent)
            stack.push_async_callback(live.close)
            show_dashboard(app, live)
            return cls(app, tracker, client, stack.pop_all())

    async def close(self) -> None:
        await self._stack.aclose()


def _max_model_len(config: ServeConfig, server: Any, infos: Any) -> int:
    lengths = [info.max_model_len for info in infos]
    if config.engine == "simulated" and (given := server.max_model_len or 0) > 0:
        lengths.append(given)  # a simulated engine has no limit but its memory
    return int(min(lengths))


def import_api_modules() -> None:
    """Imports the modules that `ApiServer.start` needs: seconds, for a thread while processes start."""
    import pd_serve.api.app
    import pd_serve.api.codec
    import pd_serve.api.core
    import pd_serve.frontend.request_tracker  # noqa: F401
