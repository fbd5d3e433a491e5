"""The dashboard in a real browser, on a cluster of real engines."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from loadtests.browser import BrowserPage, ColorScheme, browser_page, find_chromium
from tests.e2e.completion_client import CompletionClient
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess

CHROMIUM = find_chromium()
SCHEMES: tuple[ColorScheme, ...] = ("light", "dark")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian's `chromium`)")

#: The map of every instance is drawn.
MAPS = "[...document.querySelectorAll('canvas')].map((canvas) => canvas.width * canvas.height).every(Boolean)"
INSTANCES = "[...document.querySelectorAll('.instance')].map((card) => card.dataset.id).sort().join()"
RUNNING = "Number(document.querySelector('#requests [data-name=running]').textContent)"
MOVES = "[...document.querySelectorAll('#moves .what')].map((move) => move.textContent).join('\\n')"
TOO_WIDE = "document.documentElement.scrollWidth > innerWidth"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"

WATCH_ARCS = """
window.arcs = [];
new MutationObserver((changes) => {
  for (const change of changes) for (const node of change.addedNodes) arcs.push(node.dataset?.way);
}).observe(document.querySelector(".arcs"), { childList: true });
"""
#: Restarts the stream, as with another key, while requests fail.
UNPLUG = """
window.plugged = window.fetch;
window.fetch = () => Promise.reject(new Error("unplugged"));
key.value = "any";
document.getElementById("key-form").requestSubmit();
"""
OPEN_BY_KEYS = """
[...document.querySelectorAll("canvas")].some((canvas) => {
  for (const key of ["ArrowRight", "Enter"]) canvas.dispatchEvent(new KeyboardEvent("keydown", { key }));
  return dialog.open;
})
"""


@pytest.fixture
def server(cluster: ServerProcess) -> ServerProcess:
    return cluster


@pytest.fixture
async def page(server: ServerProcess, client: CompletionClient) -> AsyncIterator[BrowserPage]:
    """The page with all instances shown. At the end its console must have no complaints."""
    assert CHROMIUM is not None
    async with browser_page(CHROMIUM) as page:
        await page.set_view(1280, 900, "light")
        await page.page.goto(f"{server.url}/dashboard", wait_until="commit")
        await page.wait_until(f"{INSTANCES} === 'decode-0,decode-1,prefill-0'")
        yield page
        assert page.complaints == []


async def test_a_request_and_its_moves_are_shown(page: BrowserPage, client: CompletionClient) -> None:
    async def generate() -> None:
        body = {"prompt": token_ids(300), "max_tokens": 4000, "ignore_eos": True}
        async with client.open(body, "seen") as events:
            async for _ in events:
                pass

    request = asyncio.create_task(generate())
    try:
        await page.wait_until(f"{RUNNING} === 1")
        await page.wait_until(f"{MOVES}.includes('handoff seen-')")
        await client.until(lambda seen: seen["migrations"]["handoff"]["committed"] > 0)
        await page.page.evaluate(WATCH_ARCS)
        moves = [await client.migrate("seen", name) for name in ("decode-0", "decode-1")]
        done = next(name for name, move in zip(("decode-0", "decode-1"), moves, strict=True) if move.done)
        await page.wait_until(f"arcs.some((way) => way?.endsWith('{done}'))")
        await page.wait_until(f"{MOVES}.includes('manual seen-')")
        # The keyboard selects its squares and opens its timeline.
        await page.wait_until(OPEN_BY_KEYS)
        await page.wait_until("document.querySelector('#dialog .lanes') !== null")
        text = await page.page.evaluate("dialog.textContent")
        assert "seen" in text
        assert "manual" in text
        assert "seen" in await page.page.evaluate("tip.textContent")
    finally:
        request.cancel()
        await asyncio.wait([request])


async def test_a_page_that_is_opened_later_shows_what_was_before(
    server: ServerProcess, client: CompletionClient
) -> None:
    """Hand-offs in one row that opens, and the name of the model."""
    for index in range(5):
        await client.answer({"prompt": token_ids(100, index), "max_tokens": 40, "ignore_eos": True})
    await client.until(lambda seen: seen["migrations"]["handoff"]["committed"] >= 5)
    assert CHROMIUM is not None
    async with browser_page(CHROMIUM) as page:
        await page.page.goto(f"{server.url}/dashboard", wait_until="commit")
        await page.wait_until("document.querySelector('#moves details') !== null")
        await page.wait_until("document.querySelector('#service').textContent.includes('pd-serve')")
        await page.page.evaluate("document.querySelector('#reasons .handoff').click()")
        await page.wait_until("document.querySelector('#moves details') === null")
        await page.wait_until("document.querySelectorAll('#requests path').length > 0")
        await page.wait_until("document.querySelector('dd.freeness').title.includes('free blocks')")
        assert page.complaints == []


async def test_the_page_fits_a_phone_and_follows_the_color_scheme(page: BrowserPage) -> None:
    backgrounds = set()
    for width in (1280, 360):
        for scheme in SCHEMES:
            await page.set_view(width, 780, scheme, reduced_motion=scheme == "dark")
            await page.wait_until(f"innerWidth === {width} && {MAPS}")
            assert not await page.page.evaluate(TOO_WIDE)
            backgrounds.add(await page.page.evaluate(BACKGROUND))
    assert len(backgrounds) == 2
    # The button overrides the system's scheme, which is dark now.
    await page.page.evaluate("theme.click()")
    assert await page.page.evaluate("theme.textContent") == "Theme: light"
    await page.page.evaluate("theme.click(); theme.click()")


async def test_a_lost_stream_is_shown_until_it_is_back(page: BrowserPage) -> None:
    await page.wait_until("connection.textContent === 'live'")
    await page.page.evaluate(UNPLUG)
    await page.wait_until("!trouble.hidden && trouble.textContent.includes('unplugged')")
    await page.page.evaluate("window.fetch = plugged; true")
    await page.wait_until("trouble.hidden && connection.textContent === 'live'")
