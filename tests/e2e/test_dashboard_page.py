"""The live page in a real browser, watching real engines."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from loadtests import chromium
from tests.e2e.completion_client import CompletionClient
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess

PATH = chromium.find()

pytestmark = pytest.mark.skipif(PATH is None, reason="no Chromium on this machine (Debian's `chromium`)")

#: Every instance's map has been laid out.
MAPS = "[...document.querySelectorAll('canvas')].map((canvas) => canvas.width * canvas.height).every(Boolean)"
INSTANCES = "[...document.querySelectorAll('.instance')].map((card) => card.dataset.id).sort().join()"
RUNNING = "Number(document.querySelector('#requests [data-name=running]').textContent)"
MOVES = "[...document.querySelectorAll('#moves .what')].map((move) => move.textContent).join('\\n')"
TOO_WIDE = "document.documentElement.scrollWidth > innerWidth"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"

WATCH_ARCS = """
window.seen = [];
new MutationObserver((changes) => {
  for (const change of changes) for (const node of change.addedNodes) seen.push(node.dataset?.way);
}).observe(document.querySelector(".arcs"), { childList: true });
"""
#: The stream is begun anew, as with another key, and cannot be.
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
async def page(server: ServerProcess, client: CompletionClient) -> AsyncIterator[chromium.Page]:
    """Opened and showing the instances; when it is closed nothing may have been complained of."""
    assert PATH is not None
    async with chromium.page(PATH) as page:
        await page.look(width=1280, height=900, scheme="light")
        await page.open(f"{server.url}/dashboard")
        await page.until(f"{INSTANCES} === 'decode-0,decode-1,prefill-0'")
        yield page
        assert page.complaints == []


async def test_a_request_is_seen_and_seen_moving(page: chromium.Page, client: CompletionClient) -> None:
    async def tour() -> None:
        body = {"prompt": token_ids(300), "max_tokens": 4000, "ignore_eos": True}
        async with client.open(body, "seen") as events:
            async for _ in events:
                pass

    request = asyncio.create_task(tour())
    try:
        await page.until(f"{RUNNING} === 1")
        await page.until(f"{MOVES}.includes('handoff seen-')")
        await client.until(lambda seen: seen["migrations"]["handoff"]["committed"] > 0)
        await page.evaluate(WATCH_ARCS)
        moves = [await client.migrate("seen", name) for name in ("decode-0", "decode-1")]
        done = next(name for name, move in zip(("decode-0", "decode-1"), moves, strict=True) if move.done)
        await page.until(f"seen.some((way) => way?.endsWith('{done}'))")
        await page.until(f"{MOVES}.includes('manual seen-')")
        # Its squares can be gone through with the keyboard, and lead to its timeline.
        await page.until(OPEN_BY_KEYS)
        await page.until("document.querySelector('#dialog .lanes') !== null")
        told = await page.evaluate("dialog.textContent")
        assert "seen" in told
        assert "manual" in told
        assert "seen" in await page.evaluate("tip.textContent")
    finally:
        request.cancel()
        await asyncio.wait([request])


async def test_it_fits_a_phone_and_follows_the_scheme(page: chromium.Page) -> None:
    backgrounds = set()
    for width in (1280, 360):
        for scheme in ("light", "dark"):
            await page.look(width=width, height=780, scheme=scheme, reduced_motion=scheme == "dark")
            await page.until(f"innerWidth === {width} && {MAPS}")
            assert not await page.evaluate(TOO_WIDE)
            backgrounds.add(await page.evaluate(BACKGROUND))
    assert len(backgrounds) == 2
    # The button is stronger than the system, which is dark now.
    await page.evaluate("theme.click()")
    assert await page.evaluate("theme.textContent") == "Theme: light"
    await page.evaluate("theme.click(); theme.click()")


async def test_it_says_when_nothing_comes_any_more_and_goes_on(page: chromium.Page) -> None:
    await page.until("connection.textContent === 'live'")
    await page.evaluate(UNPLUG)
    await page.until("!trouble.hidden && trouble.textContent.includes('unplugged')")
    await page.evaluate("window.fetch = plugged; true")
    await page.until("trouble.hidden && connection.textContent === 'live'")
