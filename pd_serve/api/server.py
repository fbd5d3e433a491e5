"""Serving the application over HTTP: bind early, listen when ready, stop within a bounded time.

This uses uvicorn directly and not vLLM's `serve_http`, which handles SIGINT and SIGTERM itself, logs every
route, and at the end stops the engines and cancels the server before streams have ended. vLLM's watchdog and
uvicorn settings are used. vLLM is imported in `serve`, so that a command can call `bind` first.
"""

import asyncio
import contextlib
import errno
import os
import socket
from argparse import Namespace
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any

import uvicorn

from pd_serve.api.http_limits import HttpLimits, LimitedProtocol
from pd_serve.errors import EngineDeadError, InvalidRequestError
from pd_serve.observe.logs import is_json

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pd_serve.api.engine_client import ClusterAsyncLLM

#: When the server stops: time for requests to finish before they are aborted, and maximum time in all.
FINISH_S, STOP_S = 1.5, 3.0

#: The kernel closes the connection of a client that has acknowledged no data for this long.
STALLED_S = 300


def bind(host: str | None, port: int) -> socket.socket:
    """Binds the address without listening, so that connections are refused until the service is ready.

    Args:
        host: Name or address; None or "" for all interfaces.
        port: 0 for any free one.

    Raises:
        InvalidRequestError: The address cannot be bound; the message has the reason in one line.
    """
    where = f"port {port} of {host or 'all interfaces'}"
    if not 0 <= port < 1 << 16:
        raise InvalidRequestError(f"cannot serve on {where}: ports go up to 65535")
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
    except OSError as error:
        raise InvalidRequestError(f"cannot serve on {where}: {error}") from error
    sock = socket.socket(family, kind, protocol)
    try:
        # Connections of the last server in TIME_WAIT do not block the port.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_S * 1000)  # inherited
        sock.bind(address)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise InvalidRequestError(f"{where} is in use; choose another with --port") from error
        why = os.strerror(error.errno) if error.errno else str(error)
        raise InvalidRequestError(f"cannot serve on {where}: {why}") from error
    return sock


async def serve(
    app: "FastAPI",
    sock: socket.socket,
    args: Namespace,
    *,
    on_ready: Callable[[], None],
    max_connections: int,
    connections_elsewhere: Callable[[], int] = lambda: 0,
) -> None:
    """Serves until cancelled, and closes `sock`.

    When cancelled it accepts no new connections. Requests have `FINISH_S` to finish, then they are aborted,
    so that each open stream gets its last chunk. After `STOP_S` open connections are closed. The caller
    handles signals.

    Args:
        app: From `create_app`.
        sock: From `bind`.
        args: vLLM's API server namespace: TLS, header limits, log level, access log.
        on_ready: Called once, when connections are accepted.
        max_connections: Open connections, at all API servers; further ones get 503 and are closed.
        connections_elsewhere: Returns the number of open connections at the other API servers.

    Raises:
        EngineDeadError: The engine client stopped working; the server has ended.
        InvalidRequestError: Another process listens on the same address since `bind`.
    """
    from vllm.entrypoints.launchers.launcher import watchdog_loop
    from vllm.utils.system_utils import set_ulimit

    set_ulimit()  # for the number of open connections
    client: ClusterAsyncLLM = app.state.engine_client
    limits = HttpLimits(
        args.h11_max_incomplete_event_size,
        args.h11_max_header_count,
        max_connections,
        connections_elsewhere=connections_elsewhere,
    )
    server = _Server(_config(app, args, limits), on_ready)
    app.state.server = server  # vLLM's error handlers stop it when the engine client is dead
    serving = asyncio.create_task(server.serve(sockets=[sock]), name="http server")
    watchdog = asyncio.create_task(watchdog_loop(server, client), name="engine client watchdog")
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        await _stop(server, serving, client)
        raise
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise InvalidRequestError("the port was taken by another process; choose one with --port") from error
    finally:
        watchdog.cancel()
        serving.cancel()
        sock.close()
    if client.errored:
        raise EngineDeadError("the engine client of the API server has stopped; see the log above")


async def _stop(server: uvicorn.Server, serving: "asyncio.Task[None]", client: "ClusterAsyncLLM") -> None:
    server.should_exit = True
    done, _ = await asyncio.wait({serving}, timeout=FINISH_S)
    if not done:
        await client.abort_all()
        await asyncio.wait({serving}, timeout=STOP_S)  # uvicorn itself closes connections at STOP_S


def num_connections(app: "FastAPI") -> int:
    """Open connections of an application that `serve` serves."""
    return len(app.state.server.server_state.connections)


def _config(app: "FastAPI", args: Namespace, limits: HttpLimits) -> uvicorn.Config:
    """Uvicorn's settings, as vLLM derives them from its flags.

    Source: vllm/entrypoints/launchers/api_server/entry.py, build_and_serve; launcher.py, serve_http.
    """
    from vllm import envs
    from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config

    log_config = get_uvicorn_log_config(args)
    logs: dict[str, Any] = {"log_config": log_config} if log_config else {}
    if is_json():
        logs["log_config"] = None  # its loggers propagate to the root then
    return uvicorn.Config(
        app,
        http=partial(LimitedProtocol, limits),  # type: ignore[arg-type]  # called as the class would be
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        timeout_graceful_shutdown=STOP_S,  # type: ignore[arg-type]  # goes to asyncio.wait_for as it is
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        **({"ssl_ciphers": args.ssl_ciphers} if args.ssl_ciphers else {}),
        **logs,
    )


class _Server(uvicorn.Server):
    """Uvicorn's server without signal handlers and with a callback when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()
