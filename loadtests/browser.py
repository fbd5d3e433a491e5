"""A headless Chromium for pictures and tests of the dashboard, driven by Playwright."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from playwright.async_api import Error, Page, async_playwright

from pd_serve.errors import PdServeError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

ColorScheme = Literal["light", "dark"]


@dataclass(frozen=True, slots=True)
class BrowserPage:
    """One tab.

    Attributes:
        complaints: Warnings and errors of its console, and uncaught exceptions.
    """

    page: Page
    complaints: list[str] = field(default_factory=list)

    async def set_view(
        self, width: int, height: int, scheme: ColorScheme, *, reduced_motion: bool = False
    ) -> None:
        """Sets the window's size in CSS pixels, the color scheme, and whether animations are wanted."""
        await self.page.set_viewport_size({"width": width, "height": height})
        motion: Literal["reduce", "no-preference"] = "reduce" if reduced_motion else "no-preference"
        await self.page.emulate_media(color_scheme=scheme, reduced_motion=motion)

    async def wait_until(self, expression: str, timeout_s: float = 60.0) -> None:
        """Waits until a JavaScript expression is true.

        Playwright's own `wait_for_function` needs `unsafe-eval`, which the page's policy forbids.

        Raises:
            TimeoutError: It is not true in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not await self.page.evaluate(expression):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            raise TimeoutError(f"never true: {expression}; complaints: {self.complaints}") from error


def find_chromium() -> str | None:
    """Path of a Chromium: `$CHROMIUM`, or one on the path; None if there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.asynccontextmanager
async def browser_page(chromium: str) -> AsyncIterator[BrowserPage]:
    """A tab in a new Chromium process, which ends with the block.

    Args:
        chromium: Path of the executable.

    Raises:
        PdServeError: Chromium does not start.
    """
    async with async_playwright() as playwright:
        try:
            browser = await playwright.chromium.launch(executable_path=chromium, chromium_sandbox=False)
        except Error as error:
            raise PdServeError(f"Chromium does not start: {error.message.splitlines()[0]}") from error
        try:
            tab = BrowserPage(await browser.new_page(device_scale_factor=2))
            tab.page.on(
                "console",
                lambda message: (
                    tab.complaints.append(message.text)
                    if message.type in ("error", "warning", "assert")
                    else None
                ),
            )
            tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
            yield tab
        finally:
            await browser.close()
