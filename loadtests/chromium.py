"""A headless Chromium, told what to do over its own protocol: for pictures of the live page, and its test.

Source: chromedevtools.github.io/devtools-protocol (Page, Runtime, Emulation, Log).
"""

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from typing import Any, BinaryIO

from pd_serve.errors import PdServeError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

CALL_S = 60.0

#: A picture of a long page takes some.
MAX_MESSAGE_BYTES = 256 * 2**20


def find() -> str | None:
    """Path of a Chromium: `$CHROMIUM`, or one on the path; None if there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab.

    Attributes:
        complaints: What went to its console as a warning or an error, and what was thrown.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: BinaryIO) -> None:
        self.complaints: list[str] = []
        self._reader = reader
        self._writer = writer
        self._session: dict[str, str] = {}
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.create_task(self._read())

    async def attach(self) -> None:
        """To a tab. Raises: PdServeError: Chromium does not start."""
        try:
            target = await self.call("Target.createTarget", url="about:blank")
            attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        except (OSError, TimeoutError) as error:
            raise PdServeError(f"Chromium does not start: {error!r}") from error
        self._session = {"sessionId": attached["sessionId"]}

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.wait([self._reading])
        self._writer.close()

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Raises: PdServeError: Chromium refuses. TimeoutError: No answer."""
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        command = {"id": number, "method": method, "params": parameters, **self._session}
        self._writer.write(json.dumps(command).encode() + b"\0")
        async with asyncio.timeout(CALL_S):
            said = await answer
        if "error" in said:
            raise PdServeError(f"{method}: {said['error']['message']}")
        result: dict[str, Any] = said["result"]
        return result

    async def open(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)

    async def look(self, *, width: int, height: int, scheme: str, reduced_motion: bool = False) -> None:
        """Sets the window's size in CSS pixels, "light" or "dark", and whether things may move."""
        phone = width < 600
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2,
            mobile=phone,
        )
        motion = "reduce" if reduced_motion else "no-preference"
        features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        await self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": name, "value": value} for name, value in features.items()],
        )

    async def evaluate(self, expression: str) -> Any:
        """Raises: PdServeError: It throws."""
        result = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise PdServeError(_thrown(result["exceptionDetails"]))
        return result["result"].get("value")

    async def until(self, expression: str, bound_s: float = 60.0) -> Any:
        """The value of an expression as soon as it is true. Raises: TimeoutError: with the expression."""
        try:
            async with asyncio.timeout(bound_s):
                while not (value := await self.evaluate(expression)):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            raise TimeoutError(f"never true: {expression}; complaints: {self.complaints}") from error
        return value

    async def picture(self, *, height: int | None = None) -> bytes:
        """A PNG. Args: `height` cuts the whole page off there; None for what is in the window."""
        parameters: dict[str, Any] = {"format": "png"}
        if height is not None:
            width = await self.evaluate("innerWidth")
            clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
            parameters |= {"clip": clip, "captureBeyondViewport": True}
        shot = await self.call("Page.captureScreenshot", **parameters)
        return base64.b64decode(shot["data"])

    async def _read(self) -> None:
        while True:
            said = json.loads((await self._reader.readuntil(b"\0"))[:-1])
            match said.get("method"):
                case None:
                    self._answers.pop(said["id"]).set_result(said)
                case "Runtime.exceptionThrown":
                    self.complaints.append(_thrown(said["params"]["exceptionDetails"]))
                case "Runtime.consoleAPICalled" if said["params"]["type"] in ("error", "warning", "assert"):
                    arguments = (str(a.get("value", a.get("description"))) for a in said["params"]["args"])
                    self.complaints.append(" ".join(arguments))
                case "Log.entryAdded" if said["params"]["entry"]["level"] in ("error", "warning"):
                    entry = said["params"]["entry"]
                    self.complaints.append(f"{entry['text']} {entry.get('url', '')}")


@contextlib.asynccontextmanager
async def page(path: str) -> AsyncIterator[Page]:
    """A tab in a Chromium of its own, which ends with the block, or with this process if that is killed.

    Raises:
        PdServeError: Chromium does not start.
    """
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [path, *flags, "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        process, reader, writer = await _start(command)
        tab = Page(reader, writer)
        try:
            await tab.attach()
            yield tab
        finally:
            await tab.close()
            if process.returncode is None:
                process.kill()
            await process.wait()


async def _start(
    command: Sequence[str],
) -> tuple[asyncio.subprocess.Process, asyncio.StreamReader, BinaryIO]:
    """Starts it with its pipes: it reads commands from descriptor 3 and answers on 4, and ends with them."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    line = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", line, "bash", *command),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        pass_fds=(theirs_in, theirs_out),
        start_new_session=True,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    reader = asyncio.StreamReader(limit=MAX_MESSAGE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours_in, "rb", 0)
    )
    return process, reader, os.fdopen(ours_out, "wb", 0)


def _thrown(details: dict[str, Any]) -> str:
    return str(details.get("exception", {}).get("description") or details["text"])
