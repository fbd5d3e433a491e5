"""One API server: the HTTP application, and the frontend behind it."""

import asyncio
import logging
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Self

from pd_serve.comm.membership import InstanceInfo
from pd_serve.comm.requests import AbortByName, CountedSlot, ReadMetrics, ReadRecent
from pd_serve.comm.timing import METRICS_CALL_S
from pd_serve.comm.wire import Wire
from pd_serve.config import ServeConfig
from pd_serve.dashboard.live_view import LiveView
from pd_serve.dashboard.recent import RecentEvents
from pd_serve.frontend.accounts import Accounts
from pd_serve.frontend.frontend import Frontend
from pd_serve.launch.preparation import Prepared
from pd_serve.observe import request_log
from pd_serve.observe.attainment import Attainment
from pd_serve.observe.key_metrics import KeyMetrics
from pd_serve.observe.metrics import RequestMetrics, show_integrity
from pd_serve.observe.recorder import Observer, RequestRecorder
from pd_serve.platform.open_files import allow_many_open_files
from router.dispatcher import Dispatcher
from router.fair_share import FairShare
from router.slo import NO_SLO

if TYPE_CHECKING:
    from fastapi import FastAPI
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreOutputs

    from pd_serve.api.engine_client import ClusterAsyncLLM
    from pd_serve.observe.exposition import MetricsText

#: Instances beyond the number at the start that vLLM's metrics can tell apart.
SPARE_SLOTS = 4


class ApiServer:
    """Made by `start`; runs on one event loop, until `close`.

    Attributes:
        app: The FastAPI application.
        frontend: The requests of this server, and the cluster as it sees it.
        client: vLLM's engine client, over the cluster.
    """

    def __init__(
        self, app: "FastAPI", frontend: Frontend, client: "ClusterAsyncLLM", stack: AsyncExitStack
    ) -> None:
        self.app = app
        self.frontend = frontend
        self.client = client
        self._stack = stack

    @classmethod
    async def start(cls, prepared: Prepared, wire: Wire, find_manager: Callable[[], Awaitable[str]]) -> Self:
        """Returns when there are instances, and all of them have reported.

        Args:
            wire: Closed by `close`, or when the start fails.
            find_manager: Returns the address of the manager; see `ManagerClient`.
        """
        from vllm.envs import enable_envs_cache

        from pd_serve.api.app import create_app
        from pd_serve.api.codec import VllmCodec, arriving_now
        from pd_serve.api.core import ClusterCore
        from pd_serve.api.engine_client import ClusterAsyncLLM
        from pd_serve.api.keys import KeyAccounts
        from pd_serve.api.lora_adapters import offer_adapters
        from pd_serve.dashboard.routes import show_dashboard
        from pd_serve.observe.exposition import MetricsText

        allow_many_open_files()
        config, server = prepared.config, prepared.flags.server
        async with AsyncExitStack() as stack:
            codec = VllmCodec()
            outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
            clock = asyncio.get_running_loop().time
            shares = FairShare() if config.fair_share else None
            accounts = Accounts(config.limits_of_accounts, shares, clock, arriving_now)
            account = KeyAccounts(config.api_key).current
            unix_offset_s = time.time() - time.monotonic()
            recent = RecentEvents(clock=lambda: time.monotonic() + unix_offset_s)
            attainment, by_key = Attainment(), KeyMetrics(config.account_names)
            frontend = Frontend(
                wire,
                find_manager,
                codec,
                outputs.put_nowait,
                Dispatcher(config.policies, clock=clock, bounds_backlog=config.fair_share),
                num_slots=config.max_instances + SPARE_SLOTS,
                orphan_s=config.orphan_s,
                accounts=accounts,
                recorder=_recorder(server, [recent, attainment, by_key], unix_offset_s),
                on_integrity=show_integrity,
            )
            stack.push_async_callback(frontend.close)
            infos = await frontend.wait_for_instances()
            _take_over_facts(prepared, infos)
            tasks, slo = infos[0].engine.supported_tasks, config.slo or NO_SLO
            followed = frontend.instances.cached_blocks
            core = ClusterCore(frontend, outputs, codec, tasks, lambda: followed.format, slo, account)
            client = ClusterAsyncLLM(
                prepared.engine_config,
                core,
                log_requests=server.enable_log_requests,
                log_stats=not server.disable_log_stats,
                check=_parameter_check(config),
                accounts=accounts,
                account=account,
            )
            frontend.internal_ids = client.internal_ids
            frontend.requests.unavailable = client.unavailable
            frontend.requests.invalid = client.invalid
            app = await create_app(
                server,
                client,
                frontend,
                max_waiting=config.max_waiting_requests,
                admin_key=config.admin_key,
                max_body_bytes=config.max_body_bytes,
                on_429=lambda: by_key.refused(account()),
            )
            offer_adapters(app.state.openai_serving_models, frontend.lora_adapters)
            labels = {"service": config.service_name, "model_name": server.served_model_name[0]}
            live = _live_view(wire.name, frontend, recent, labels)
            live.open()
            stack.push_async_callback(live.close)
            show_dashboard(app, live)
            frontend.api_servers.counts |= {
                "slo_requests": lambda: attainment.counts.requests,
                "slo_met": lambda: attainment.counts.met,
            }
            _share(frontend, app, MetricsText(frontend.report, labels, wire.name), live, recent)
            enable_envs_cache()  # vLLM asks for a variable with each token: 7 % of the CPU time of a stream
            return cls(app, frontend, client, stack.pop_all())

    async def end_requests(self, why: str) -> None:
        """Answers 503 from now on, also to requests without output, and ends streams as at a stop."""
        self.app.state.overload.is_closed = True
        for request in list(self.frontend.requests.requests.values()):
            if not request.ledger.token_ids:
                self.client.unavailable(request.request_id, why)
        await self.client.abort_all()

    async def close(self) -> None:
        await self._stack.aclose()


def _share(
    frontend: Frontend, app: "FastAPI", metrics: "MetricsText", live: LiveView, recent: RecentEvents
) -> None:
    """Shares with the other API servers what concerns the whole service: metrics, limits, page, aborts."""
    from pd_serve.api.engine_functions import abort_everywhere
    from pd_serve.observe.exposition import show_metrics

    api_servers = frontend.api_servers

    async def own_metrics(sender: str, request: ReadMetrics) -> str:
        return await metrics.own()

    async def metrics_of_others() -> Iterable[str]:
        requests = dict.fromkeys(api_servers.others, ReadMetrics())
        return (await api_servers.ask_others(requests, METRICS_CALL_S)).values()

    async def counted(sender: str, request: ReadRecent) -> list[CountedSlot]:
        return recent.counted(request.since)

    async def abort(sender: str, request: AbortByName) -> int:
        client: ClusterAsyncLLM = app.state.engine_client
        return await (client.abort_named(request.names) if request.names else client.abort_all())

    async def abort_at_all(names: list[str]) -> int:
        request = AbortByName(names)
        others = await api_servers.ask_others(dict.fromkeys(api_servers.others, request), METRICS_CALL_S)
        return await abort("", request) + sum(others.values())

    frontend.server.serve(AbortByName, abort)
    frontend.server.serve(ReadMetrics, own_metrics)
    frontend.server.serve(ReadRecent, counted)
    show_metrics(app, metrics, metrics_of_others)
    abort_everywhere(app, abort_at_all)
    api_servers.counts |= {
        "waiting": lambda: app.state.overload.num_waiting,
        "pages": lambda: live.num_watchers,
    }
    api_servers.open()


def _live_view(name: str, frontend: Frontend, recent: RecentEvents, labels: dict[str, str]) -> LiveView:
    """The live page's data. It reads what the other API servers have counted before each event."""
    api_servers = frontend.api_servers

    async def update() -> None:
        requests = {other: ReadRecent(recent.next_of(other)) for other in api_servers.others}
        for other, slots in (await api_servers.ask_others(requests, METRICS_CALL_S)).items():
            recent.note_elsewhere(other, slots)

    return LiveView(
        name,
        frontend.snapshot,
        frontend.instances,
        recent,
        labels,
        frontend.totals,
        lambda: api_servers.elsewhere("pages"),
        update,
    )


def _recorder(server: Namespace, others: Iterable[Observer], unix_offset_s: float) -> RequestRecorder:
    """A recorder with these observers, metrics, logs and traces; its clock is `time.monotonic`."""
    observers: list[Observer] = [RequestMetrics(), *others]
    level = logging.INFO if server.enable_log_requests else logging.DEBUG
    if request_log.logger.isEnabledFor(level):
        observers.append(request_log.RequestLog(level))
    if server.otlp_traces_endpoint is not None:
        from pd_serve.observe.tracing import RequestTracer

        observers.append(RequestTracer(unix_offset_s))
    return RequestRecorder(observers, unix_offset_s=unix_offset_s)


def _take_over_facts(prepared: Prepared, infos: Sequence[InstanceInfo]) -> None:
    """Notes what an instance found out when it made its KV cache, as vLLM's own front end does."""
    engine, vllm = infos[0].engine, prepared.engine_config
    vllm.cache_config.num_gpu_blocks = engine.num_blocks
    vllm.cache_config.block_size = engine.block_tokens
    vllm.model_config.max_model_len = _max_model_len(prepared.config, prepared.flags.server, infos)


def _max_model_len(config: ServeConfig, server: Namespace, infos: Sequence[InstanceInfo]) -> int:
    lengths = [info.engine.max_model_len for info in infos]
    if config.engine == "simulated" and (given := server.max_model_len or 0) > 0:
        lengths.append(given)  # a simulated engine has no limit but its memory
    return min(lengths)


def _parameter_check(config: ServeConfig) -> "Callable[[SamplingParams], None] | None":
    """Refuses parameters that simulated engines do not support; None for vLLM's engines."""
    if config.engine != "simulated":
        return None
    from pd_serve.simulated_engine.vllm_format import check_parameters

    return check_parameters


def import_api_modules() -> None:
    """Imports the modules that `ApiServer.start` needs: seconds, for a thread while processes start."""
    import pd_serve.api.app
    import pd_serve.api.codec
    import pd_serve.api.core
    import pd_serve.frontend.request_tracker  # noqa: F401
