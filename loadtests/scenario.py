"""`make loadtest`: a cluster of simulated engines under a load that rises and falls, and a drain in it.

    python -m loadtests.scenario [--layout disaggregated|neutral] [--seconds 120] [--rate 4] [--out DIR]

Starts the cluster, runs Locust in a process of its own, looks at the cluster once a second, and writes
`report.html`, `report.png`, `report.json`, `samples.json` and the logs. The exit code is 1 when a stream was
wrong, a request failed, or the cluster finds something wrong with itself at the end.
"""

import argparse
import asyncio
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from loadtests import cluster_samples, report_page
from loadtests.bench.servers import free_port, started
from loadtests.cluster_samples import Sample
from loadtests.outcome import EXIT_FAILED, EXIT_OK
from pd_serve.errors import PdServeError

LOCUSTFILE = Path(__file__).with_name("locustfile.py")

#: (flags, the pool that is scaled and drained), by name.
LAYOUTS = {
    "disaggregated": ("--prefill 1 --decode 1 --autoscale-decode 1:3", "decode"),
    "neutral": ("--neutral 1 --autoscale 1:3", "neutral"),
}

#: The pool follows the load in seconds instead of minutes.
CLUSTER = (
    "serve tiny --engine simulated "
    "--set scale_interval_s=2 --set drain_after_s=5 --set scale_threshold=20 --set scale_margin=20"
)

LOAD = "--trace m-m --max-tokens 250 --max-prompt-tokens 1000 --shape day --api both --high-priority 0.1"
SLO = "ttft=5s,tpot=100ms"

SAMPLE_S = 1.0

#: Samples.
SHOWN_EVERY = 5

#: Of the load's time, from when Locust was started; with its start and warm-up about the peak of the day.
DRAIN_AT = 0.6

#: The last streams may go on for so long after the last has begun.
LAST_STREAMS_S = 300.0


@dataclass
class Scenario:
    """One run; everything is written to `out`.

    Attributes:
        layout: One of `LAYOUTS`.
        seconds: How long requests arrive.
        rate: Mean requests/s.
        problems: Why it failed.
        events: (time since the epoch, what was done).
        seen: (time since the epoch, body of `GET /cluster`).
    """

    layout: str
    out: Path
    seconds: float
    rate: float
    problems: list[str] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    seen: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    _zero: float = 0.0

    async def run(self) -> int:
        """Returns the exit code. Raises: PdServeError: The cluster did not come up."""
        self.out.mkdir(parents=True, exist_ok=True)
        port = free_port()
        flags = f"{CLUSTER} {LAYOUTS[self.layout][0]}"
        command = [str(Path(sys.executable).with_name("pd-serve")), *shlex.split(flags), f"--port={port}"]
        say(f"starting a cluster: pd-serve {flags}")
        with (self.out / "server.log").open("w+b") as log:
            async with (
                started("pd-serve", command, port, log, {}) as server,
                httpx.AsyncClient(base_url=server.url, timeout=30) as http,
            ):
                sampler, drain = (asyncio.create_task(job) for job in (self._sample(http), self._drain(http)))
                try:
                    load = await self._load(server.url)
                    drain.cancel()
                    await self._integrity(http)
                finally:
                    for task in (sampler, drain):
                        task.cancel()
                    await asyncio.wait([sampler, drain])
                for task in (sampler, drain):
                    if not task.cancelled() and (error := task.exception()) is not None:
                        self.problems.append(f"failed beside the load: {error!r}")
        return self.conclude([shlex.join(["pd-serve", *command[1:]]), shlex.join(load)])

    async def _load(self, url: str) -> list[str]:
        """Runs Locust to its end. Returns its command line."""
        requests = max(2, round(self.rate * self.seconds))
        command = ["locust", f"--locustfile={LOCUSTFILE}", "--headless", f"--host={url}", *shlex.split(LOAD)]
        command += [f"--rate={self.rate:g}", f"--requests={requests}", f"--slo={SLO}", "--check=simulated"]
        command += [
            f"--report={self.out / 'report.json'}",
            f"--csv={self.out / 'locust'}",
            "--csv-full-history",
        ]
        say(f"load: {requests} requests in {self.seconds:.0f} s; Locust's tables: {self.out / 'locust.log'}")
        (self.out / "report.json").unlink(missing_ok=True)
        with (self.out / "locust.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
            try:
                async with asyncio.timeout(self.seconds + LAST_STREAMS_S):
                    code = await process.wait()
            except TimeoutError:
                self.problems.append("the load did not end; see locust.log")
            else:
                if code:
                    self.problems.append(f"Locust's exit code is {code}; see locust.log")
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        return command

    async def _sample(self, http: httpx.AsyncClient) -> None:
        self._zero = time.time()
        while True:
            try:
                response = await http.get("/cluster")
                response.raise_for_status()
            except httpx.HTTPError as error:
                self.problems.append(f"GET /cluster failed: {error!r}")
                return
            self.seen.append((time.time(), response.json()))
            if len(self.seen) % SHOWN_EVERY == 1:
                say(cluster_samples.line(self._samples(self._zero)[-1]))
            await asyncio.sleep(SAMPLE_S)

    async def _drain(self, http: httpx.AsyncClient) -> None:
        """Empties and stops the busiest instance of the pool, as soon as there is another one."""
        role = LAYOUTS[self.layout][1]
        await asyncio.sleep(self.seconds * DRAIN_AT)
        while True:
            rows = self.seen[-1][1]["instances"]
            ready = [row for row in rows if row["role"] == role and row["state"] == "ready"]
            if len(ready) > 1:
                busiest = max(ready, key=lambda row: row["running"])
                what = f"{busiest['id']} is drained and stopped; {busiest['running']} requests run on it"
                answer = await http.post("/cluster/drain", json={"instance": busiest["id"], "stop": True})
                if answer.status_code == 202:
                    self.events.append((time.time(), what))
                    say(what)
                    return
            await asyncio.sleep(SAMPLE_S)

    async def _integrity(self, http: httpx.AsyncClient) -> None:
        try:
            response = await http.get("/cluster/integrity")
            response.raise_for_status()
        except httpx.HTTPError as error:
            self.problems.append(f"GET /cluster/integrity failed: {error!r}")
            return
        violations = response.json()["violations"]
        self.problems += [f"integrity: {violation}" for violation in violations]
        say("integrity: " + ("; ".join(violations) or "nothing is wrong"))

    def _samples(self, zero: float) -> list[Sample]:
        return [Sample(at - zero, cluster) for at, cluster in self.seen]

    def conclude(self, commands: Sequence[str]) -> int:
        """Writes the report, says what was wrong, and returns the exit code."""
        path = self.out / "report.json"
        if not path.exists():
            say(f"FAILED: the load did not run; see {self.out / 'locust.log'}")
            return EXIT_FAILED
        result = json.loads(path.read_text())
        samples = self._samples(result["began_at"])
        events = [(at - result["began_at"], what) for at, what in self.events]
        if not events:
            self.problems.append(f"nothing was drained: never two {LAYOUTS[self.layout][1]} instances")
        failures = result["summary"]["failures"]
        self.problems += [f"{count} requests: {kind}" for kind, count in failures.items()]
        rows = [{"at_s": round(sample.at_s, 3), **sample.cluster} for sample in samples]
        (self.out / "samples.json").write_text(json.dumps({"events": events, "samples": rows}))
        report_page.write(self.out, result, samples, events, self.problems, commands)
        for problem in self.problems:
            say(f"FAILED: {problem}")
        summary = result["summary"]
        say(f"{summary['ended']} of {summary['planned']} requests ended, {summary['failed']} failed")
        say(f"report: {self.out / 'report.html'}")
        return EXIT_FAILED if self.problems else EXIT_OK


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="loadtest", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="disaggregated", help="Kind of the cluster.")
    parser.add_argument("--out", type=Path, default=Path("results/loadtest"), help="Where to write.")
    parser.add_argument("--seconds", type=float, default=120.0, help="How long requests arrive.")
    parser.add_argument(
        "--rate", type=float, default=4.0, help="Mean requests/s; 1.8 times that at the peak."
    )
    options = parser.parse_args()
    try:
        code = asyncio.run(Scenario(options.layout, options.out, options.seconds, options.rate).run())
    except PdServeError as error:
        say(f"FAILED: {error}")
        code = EXIT_FAILED
    except KeyboardInterrupt:
        say("interrupted; everything that was started has ended")
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
