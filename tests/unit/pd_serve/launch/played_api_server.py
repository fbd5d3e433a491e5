"""A process in the place of an API server's: it does what its name says, and imports no vLLM."""

import asyncio
import os
import signal
import socket
import sys
from typing import Any, cast

from migration.child_process import end_with
from pd_serve.launch.api_server_messages import ApiServerFailed, FlagsParsed, JoinCluster, Serving
from pd_serve.launch.child_channel import ChildChannel


async def run(channel: ChildChannel, sock: socket.socket) -> int:
    settings = await channel.receive()
    match settings.name:
        case "invalid":
            channel.send(ApiServerFailed("--dtype: no such type", True))
            await channel.close()
            return 1
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hangs":
            await asyncio.sleep(600)
        case "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # It has the secret by the channel, not by what others can see.
    secret = settings.keys.secret.decode()
    seen = " ".join(sys.argv) + "".join(os.environ.values())
    channel.send(FlagsParsed(cast(Any, settings.config.port), f"secret is seen: {secret in seen}", False))
    cluster: JoinCluster = await channel.receive()
    assert cluster.manager == "tcp://manager"
    server = await asyncio.start_server(lambda reader, writer: writer.close(), sock=sock)
    channel.send(Serving())
    if settings.name == "fails later":
        channel.send(ApiServerFailed("the engine client has stopped", False))
        await channel.close()
        return 1
    await server.serve_forever()
    return 0


async def main() -> int:
    channel, sock, parent = map(int, sys.argv[1:])
    end_with(parent)
    return await run(await ChildChannel.open(socket.socket(fileno=channel)), socket.socket(fileno=sock))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
