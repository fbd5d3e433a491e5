"""An API server's process, as `pd-serve serve` sees it: start, messages, end."""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import Process
from contextlib import suppress
from typing import Protocol, Self, TypeVar

from pd_serve.comm.timing import API_SERVER_START_S
from pd_serve.errors import InvalidRequestError, PdServeError
from pd_serve.launch import api_server_process
from pd_serve.launch.api_server_messages import (
    ApiServerFailed,
    ApiServerSettings,
    FlagsParsed,
    JoinCluster,
    Serving,
)
from pd_serve.launch.child_channel import ChildChannel

T = TypeVar("T")

#: Time for the last message of a process that has ended. It is there already, unless this machine hangs.
LAST_MESSAGE_S = 1.0


class ApiServerChild(Protocol):
    """A child process with one API server. `SpawnedApiServer` is the one that is used.

    Attributes:
        name: Of the API server, on the wire.
        pid: Of the process.
    """

    @property
    def name(self) -> str: ...

    @property
    def pid(self) -> int: ...

    async def flags(self) -> FlagsParsed:
        """Waits until vLLM's flags are parsed. Raises: PdServeError: it has ended, or takes too long."""
        ...

    async def join(self, cluster: JoinCluster) -> None:
        """Has it join a cluster. Returns when it serves. Raises: PdServeError: as `flags`."""
        ...

    async def ended(self) -> str:
        """Waits for its end. Returns the reason in words, to follow its name."""
        ...

    def terminate(self) -> None:
        """Has it end its requests, in a bounded time, and then itself."""
        ...

    def kill(self) -> None:
        """Ends it at once."""
        ...


class SpawnedApiServer:
    """Implements `ApiServerChild` by a new Python process, which imports vLLM itself."""

    def __init__(self, name: str, process: Process, channel: ChildChannel) -> None:
        self.name = name
        self._process = process
        self._channel = channel
        self._messages: asyncio.Queue[object] = asyncio.Queue()
        self._failed: ApiServerFailed | None = None
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, settings: ApiServerSettings, sock: socket.socket, parent: int) -> Self:
        """Starts the process.

        Args:
            sock: Bound to the service's port. All API servers share it, with the queue of connections that
                none of them has accepted: it takes none with it when it dies, and gets none while it hangs.
            parent: This process, whose end ends the child.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            numbers = [str(theirs.fileno()), str(sock.fileno()), str(parent)]
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", api_server_process.__name__, *numbers),
                pass_fds=(theirs.fileno(), sock.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                # Ctrl-C in a terminal reaches its parent only, which then ends it. No session of its own:
                # Linux gives each session an equal share of the cores.
                preexec_fn=os.setpgrp,
            )
        channel = await ChildChannel.open(ours)
        channel.send(settings)
        return cls(settings.name, process, channel)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def flags(self) -> FlagsParsed:
        return await self._next(FlagsParsed)

    async def join(self, cluster: JoinCluster) -> None:
        self._channel.send(cluster)
        await self._next(Serving)

    async def _read(self) -> None:
        """Reads its messages; after the last one comes None."""
        with suppress(EOFError):
            while True:
                message = await self._channel.receive()
                if isinstance(message, ApiServerFailed):
                    self._failed = message
                self._messages.put_nowait(message)
        self._messages.put_nowait(None)

    async def _next(self, kind: type[T]) -> T:
        try:
            async with asyncio.timeout(API_SERVER_START_S):
                message = await self._messages.get()
        except TimeoutError:
            raise PdServeError(f"the API server has not started within {API_SERVER_START_S:.0f} s") from None
        if isinstance(message, kind):
            return message
        why = await self.ended()
        failed = self._failed or ApiServerFailed(f"the API server {why}", False)
        raise (InvalidRequestError if failed.is_invalid else PdServeError)(failed.text)

    async def ended(self) -> str:
        code = await self._process.wait()
        await asyncio.wait({self._reading}, timeout=LAST_MESSAGE_S)
        await self._channel.close()
        if self._failed is not None:
            return f"has ended: {self._failed.text}"
        return (
            f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has ended with exit code {code}"
        )

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()
