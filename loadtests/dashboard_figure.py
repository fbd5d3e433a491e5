"""A picture of the dashboard over a loaded cluster of simulated engines, for the README.

    python -m loadtests.dashboard_figure [--out docs/figures/dashboard.png] [--scheme light]

Needs a Chromium (Debian's `chromium`, or `CHROMIUM=path`). Near the end an instance is drained, and the
picture is taken while its requests move.
"""

import argparse
import asyncio
import shlex
import sys
import tempfile
from pathlib import Path

import httpx

from loadtests.browser import BrowserPage, ColorScheme, browser_page, find_chromium
from loadtests.cluster_load_test import LOCUSTFILE, busiest_ready, serve_command
from loadtests.servers import running
from loadtests.terminal import say
from pd_serve.errors import PdServeError

CLUSTER = (
    "serve tiny --engine simulated --prefill 1 --decode 3 --autoscale-decode 2:4 --set drain_after_s=600"
)
LOAD = "--trace m-m --max-tokens 600 --max-prompt-tokens 2500 --api both --check simulated"

WIDTH, HEIGHT = 1280, 980

#: The animation of a move takes a second; the picture is taken in its middle.
MID_MOVE_S = 0.45

MOVES_BY_DRAIN = "[...document.querySelectorAll('.arcs g path.drain')].length"


async def take_picture(out: Path, scheme: ColorScheme, seconds: float, rate: float) -> None:
    """Writes the picture.

    Raises:
        PdServeError: There is no Chromium, or the cluster did not start.
    """
    chromium = find_chromium()
    if chromium is None:
        raise PdServeError("no Chromium on this machine: install Debian's `chromium`, or set CHROMIUM")
    say(f"starting a cluster: pd-serve {CLUSTER}")
    with tempfile.TemporaryFile() as log:
        async with (
            running(serve_command(CLUSTER), log) as server,
            browser_page(chromium) as tab,
            httpx.AsyncClient(base_url=server.url, timeout=60) as http,
        ):
            requests = f"--rate={rate:g} --requests={round(rate * (seconds + 60))}"
            load = f"-m locust --locustfile={LOCUSTFILE} --headless --host={server.url} {LOAD} {requests}"
            process = await asyncio.create_subprocess_exec(
                sys.executable, *shlex.split(load), stdout=log, stderr=log, stdin=asyncio.subprocess.DEVNULL
            )
            try:
                await tab.set_view(WIDTH, HEIGHT, scheme)
                await tab.page.goto(f"{server.url}/dashboard", wait_until="commit")
                png = await picture_of_drain(tab, http, seconds)
            finally:
                if process.returncode is None:
                    process.kill()
                await process.wait()
    await asyncio.to_thread(out.write_bytes, png)
    say(f"written: {out}")


async def picture_of_drain(tab: BrowserPage, http: httpx.AsyncClient, seconds: float) -> bytes:
    """A PNG of the page while an instance is drained, after the page has been open for `seconds`."""
    say(f"the load runs for {seconds:.0f} s before the picture is taken")
    await asyncio.sleep(seconds)
    busiest = busiest_ready((await http.get("/cluster")).json(), "decode", at_least=1)
    if busiest is None:
        raise PdServeError("no decode instance is ready")
    (await http.post("/cluster/drain", json={"instance": busiest["id"]})).raise_for_status()
    await tab.wait_until(MOVES_BY_DRAIN)
    await asyncio.sleep(MID_MOVE_S)
    png = await tab.page.screenshot()
    if tab.complaints:
        raise PdServeError(f"messages on the page's console: {tab.complaints}")
    return png


def main() -> None:
    parser = argparse.ArgumentParser(prog="dashboard_figure", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/figures/dashboard.png"), help="The picture.")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light", help="Color scheme.")
    parser.add_argument("--seconds", type=float, default=90.0, help="Duration of the load beforehand.")
    parser.add_argument("--rate", type=float, default=6.0, help="Requests/s.")
    options = parser.parse_args()
    try:
        asyncio.run(take_picture(options.out, options.scheme, options.seconds, options.rate))
    except PdServeError as error:
        say(f"FAILED: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
