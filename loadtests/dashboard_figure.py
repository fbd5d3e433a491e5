"""A picture of the live page over a loaded cluster of simulated engines, for the README.

    python -m loadtests.dashboard_figure [--out docs/figures/dashboard.png] [--scheme light]

Needs a Chromium (Debian's `chromium`, or `CHROMIUM=path`). Near the end an instance is drained by hand, and
the picture is taken while its requests move.
"""

import argparse
import asyncio
import shlex
import sys
import tempfile
from pathlib import Path

import httpx

from loadtests import chromium
from loadtests.bench.servers import free_port, started
from loadtests.scenario import LOCUSTFILE, say
from pd_serve.errors import PdServeError

CLUSTER = (
    "serve tiny --engine simulated --prefill 1 --decode 3 --autoscale-decode 2:4 --set drain_after_s=600"
)
LOAD = "--trace m-m --max-tokens 600 --max-prompt-tokens 2500 --api both --check simulated"

WIDTH, HEIGHT = 1280, 980

#: A move is on its way for a second; this is when it is in the middle.
MID_WAY_S = 0.45

MOVES_BY_DRAIN = "[...document.querySelectorAll('.arcs g path.drain')].length"


async def take(out: Path, scheme: str, seconds: float, rate: float) -> None:
    """Raises: PdServeError: No Chromium, or the cluster did not come up."""
    path = chromium.find()
    if path is None:
        raise PdServeError("no Chromium on this machine: install Debian's `chromium`, or set CHROMIUM")
    port = free_port()
    command = [str(Path(sys.executable).with_name("pd-serve")), *shlex.split(CLUSTER), f"--port={port}"]
    say(f"starting a cluster: pd-serve {CLUSTER}")
    with tempfile.TemporaryFile() as log:
        async with (
            started("pd-serve", command, port, log, {}) as server,
            chromium.page(path) as page,
            httpx.AsyncClient(base_url=server.url, timeout=60) as http,
        ):
            requests = f"--rate={rate:g} --requests={round(rate * (seconds + 60))}"
            load = f"-m locust --locustfile={LOCUSTFILE} --headless --host={server.url} {LOAD} {requests}"
            process = await asyncio.create_subprocess_exec(
                sys.executable, *shlex.split(load), stdout=log, stderr=log, stdin=asyncio.subprocess.DEVNULL
            )
            try:
                png = await picture(page, http, f"{server.url}/dashboard", scheme, seconds)
            finally:
                if process.returncode is None:
                    process.kill()
                await process.wait()
    await asyncio.to_thread(out.write_bytes, png)
    say(f"written: {out}")


async def picture(
    page: chromium.Page, http: httpx.AsyncClient, url: str, scheme: str, seconds: float
) -> bytes:
    """A PNG of the page once it has been watched for so long, while an instance is drained."""
    await page.look(width=WIDTH, height=HEIGHT, scheme=scheme)
    await page.open(url)
    say(f"the load goes on for {seconds:.0f} s before the picture is taken")
    await asyncio.sleep(seconds)
    rows = (await http.get("/cluster")).json()["instances"]
    ready = [row for row in rows if row["role"] == "decode" and row["state"] == "ready"]
    busiest = max(ready, key=lambda row: row["running"])["id"]
    (await http.post("/cluster/drain", json={"instance": busiest})).raise_for_status()
    await page.until(MOVES_BY_DRAIN)
    await asyncio.sleep(MID_WAY_S)
    png = await page.picture()
    if page.complaints:
        raise PdServeError(f"the page's console: {page.complaints}")
    return png


def main() -> None:
    parser = argparse.ArgumentParser(prog="dashboard_figure", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/figures/dashboard.png"), help="The picture.")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light", help="Colours.")
    parser.add_argument("--seconds", type=float, default=90.0, help="How long to load it before.")
    parser.add_argument("--rate", type=float, default=6.0, help="Requests/s.")
    options = parser.parse_args()
    try:
        asyncio.run(take(options.out, options.scheme, options.seconds, options.rate))
    except PdServeError as error:
        say(f"FAILED: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
