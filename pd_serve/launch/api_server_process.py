"""The process of one API server: `python -m pd_serve.launch.api_server_process CHANNEL LISTENER PARENT`.

`pd-serve serve` starts it with two open sockets, one end of a `ChildChannel` and the bound socket of the
service's port, which all API servers share. It parses vLLM's flags, tells its parent what instances are
started with, joins the cluster when there is one, and serves.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys

from migration.child_process import end_with
from pd_serve.comm.wire import Wire
from pd_serve.errors import InvalidRequestError, PdServeError
from pd_serve.launch.api_server_messages import (
    ApiServerFailed,
    ApiServerSettings,
    FlagsParsed,
    JoinCluster,
    Serving,
)
from pd_serve.launch.child_channel import ChildChannel
from pd_serve.launch.preparation import parse
from pd_serve.launch.signals import end_on
from pd_serve.observe.logs import configure_logging

logger = logging.getLogger(__name__)


async def run(channel: ChildChannel, sock: socket.socket) -> None:
    """Serves until SIGTERM. Raises: PdServeError: with one line."""
    end_on(signal.SIGTERM)
    gc.disable()  # as in the instances: collecting while importing costs a tenth of the time
    settings: ApiServerSettings = await channel.receive()
    configure_logging(settings.name, is_shown=True)
    prepared = await asyncio.to_thread(parse, settings.config, settings.model)
    server = prepared.flags.server
    manager_config = prepared.manager_config("", settings.keys)
    channel.send(FlagsParsed(manager_config, server.served_model_name[0], bool(server.ssl_certfile)))

    from pd_serve.api.server import num_connections, serve
    from pd_serve.launch.api_server import ApiServer, import_api_modules

    await asyncio.to_thread(import_api_modules)
    cluster: JoinCluster = await channel.receive()

    async def find_manager() -> str:
        return cluster.manager

    def on_ready() -> None:
        gc.freeze()
        gc.enable()
        api.frontend.api_servers.counts["connections"] = lambda: num_connections(api.app)
        channel.send(Serving())

    wire = Wire(settings.name, cluster.host, settings.keys)
    api = await ApiServer.start(prepared, wire, find_manager)
    try:
        api_servers = api.frontend.api_servers
        await serve(
            api.app,
            sock,
            server,
            on_ready=on_ready,
            max_connections=settings.config.max_connections,
            connections_elsewhere=lambda: api_servers.elsewhere("connections"),
        )
    finally:
        await api.close()


async def _run(channel_fd: int, listener_fd: int) -> int:
    channel = await ChildChannel.open(socket.socket(fileno=channel_fd))
    try:
        await run(channel, socket.socket(fileno=listener_fd))
    except (asyncio.CancelledError, EOFError):
        return 0
    except Exception as error:
        if not isinstance(error, PdServeError):
            logger.debug("the API server ends", exc_info=error)
        text = str(error) if isinstance(error, PdServeError) else f"{type(error).__name__}: {error}"
        channel.send(ApiServerFailed(" ".join(text.split()), isinstance(error, InvalidRequestError)))
        await channel.close()
        return 1
    return 0


def main() -> None:
    """Entry point of the process."""
    import uvloop

    channel_fd, listener_fd, parent = map(int, sys.argv[1:])
    end_with(parent)
    for number in (channel_fd, listener_fd):
        os.set_inheritable(number, False)
    # Not closed: that would wait for threads which still import vLLM.
    code = asyncio.Runner(loop_factory=uvloop.new_event_loop).run(_run(channel_fd, listener_fd))
    sys.stdout.flush()
    sys.stderr.flush()
    # Interpreter shutdown with torch loaded takes two seconds and frees nothing that matters.
    os._exit(code)


if __name__ == "__main__":
    main()
