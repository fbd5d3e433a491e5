"""One load test of a cluster of simulated engines: start, Locust, samples, a drain, the report."""

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

from loadtests.outcome import EXIT_FAILED, EXIT_OK
from loadtests.report import cluster_samples
from loadtests.report.cluster_samples import ClusterSample
from loadtests.report.page import LoadTestReport
from loadtests.servers import ServerCommand, free_port, running, script
from loadtests.terminal import say

LOCUSTFILE = Path(__file__).with_name("locustfile.py")

#: (flags, the role that is scaled and drained), by name.
LAYOUTS = {
    "disaggregated": ("--prefill 1 --decode 1 --autoscale-decode 1:3", "decode"),
    "neutral": ("--neutral 1 --autoscale 1:3", "neutral"),
}

#: The pool follows the load within seconds instead of minutes.
CLUSTER = (
    "serve tiny --engine simulated "
    "--set scale_interval_s=2 --set drain_after_s=5 --set scale_threshold=20 --set scale_margin=20"
)

LOAD = "--trace m-m --max-tokens 250 --max-prompt-tokens 1000 --shape day --api both --high-priority 0.1"
SLO = "ttft=5s,tpot=100ms"

SAMPLE_S = 1.0

#: Samples per printed line.
SAMPLES_PER_LINE = 5

#: When the drain begins, as a share of the load's time since Locust was started. With Locust's own start and
#: warm-up this is about the peak of the day.
DRAIN_AT = 0.6

#: Time limit of the last streams after the last request has started.
LAST_STREAMS_S = 300.0


def serve_command(flags: str) -> ServerCommand:
    """`pd-serve` with these flags on a free port."""
    port = free_port()
    return ServerCommand("pd-serve", [script("pd-serve"), *shlex.split(flags), f"--port={port}"], port)


def busiest_ready(cluster: dict[str, Any], role: str, at_least: int) -> dict[str, Any] | None:
    """The instance of a role with the most running requests; None with fewer than `at_least` ready ones.

    Args:
        cluster: Body of `GET /cluster`.
    """
    ready = [row for row in cluster["instances"] if row["role"] == role and row["state"] == "ready"]
    return max(ready, key=lambda row: row["running"]) if len(ready) >= at_least else None


@dataclass
class ClusterLoadTest:
    """One test, to be run once; it writes to `out`.

    Attributes:
        layout: One of `LAYOUTS`.
        seconds: Duration of the arrivals.
        rate: Mean requests/s.
        problems: Reasons why the test failed.
        events: (time since the epoch, action taken on the cluster).
        samples: (time since the epoch, body of `GET /cluster`).
    """

    layout: str
    out: Path
    seconds: float
    rate: float
    problems: list[str] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    samples: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    async def run(self) -> int:
        """Returns the exit code.

        Raises:
            PdServeError: The cluster did not start.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        command = serve_command(f"{CLUSTER} {LAYOUTS[self.layout][0]}")
        say(f"starting a cluster: {shlex.join(['pd-serve', *command.command[1:]])}")
        with (self.out / "server.log").open("w+b") as log:
            async with (
                running(command, log) as server,
                httpx.AsyncClient(base_url=server.url, timeout=30) as http,
            ):
                sampler, drain = (asyncio.create_task(job) for job in (self._sample(http), self._drain(http)))
                try:
                    load = await self._load(server.url)
                    drain.cancel()
                    await self._check_integrity(http)
                finally:
                    for task in (sampler, drain):
                        task.cancel()
                    await asyncio.wait([sampler, drain])
                for task in (sampler, drain):
                    if not task.cancelled() and (error := task.exception()) is not None:
                        self.problems.append(f"sampling or draining failed: {error!r}")
        return self.conclude([shlex.join(["pd-serve", *command.command[1:]]), shlex.join(load)])

    async def _load(self, url: str) -> list[str]:
        """Runs Locust to its end and returns its command line."""
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
        zero = time.time()
        while True:
            if (cluster := await self._get(http, "/cluster")) is None:
                return
            self.samples.append((time.time(), cluster))
            if len(self.samples) % SAMPLES_PER_LINE == 1:
                say(cluster_samples.line(ClusterSample(time.time() - zero, self.samples[-1][1])))
            await asyncio.sleep(SAMPLE_S)

    async def _drain(self, http: httpx.AsyncClient) -> None:
        """Drains and stops the busiest instance of the pool as soon as a second one is ready."""
        role = LAYOUTS[self.layout][1]
        await asyncio.sleep(self.seconds * DRAIN_AT)
        while True:
            busiest = busiest_ready(self.samples[-1][1], role, at_least=2)
            if busiest is not None:
                what = f"{busiest['id']} is drained and stopped, with {busiest['running']} running requests"
                answer = await http.post("/cluster/drain", json={"instance": busiest["id"], "stop": True})
                if answer.status_code == 202:
                    self.events.append((time.time(), what))
                    say(what)
                    return
            await asyncio.sleep(SAMPLE_S)

    async def _check_integrity(self, http: httpx.AsyncClient) -> None:
        if (integrity := await self._get(http, "/cluster/integrity")) is not None:
            violations = integrity["violations"]
            self.problems += [f"integrity: {violation}" for violation in violations]
            say("integrity: " + ("; ".join(violations) or "no violation"))

    async def _get(self, http: httpx.AsyncClient, path: str) -> dict[str, Any] | None:
        """The answer; None for a failure, which is then one of the problems."""
        try:
            response = await http.get(path)
            answer: dict[str, Any] = response.raise_for_status().json()
        except httpx.HTTPError as error:
            self.problems.append(f"GET {path} failed: {error!r}")
            return None
        return answer

    def conclude(self, commands: Sequence[str]) -> int:
        """Writes the report, prints the problems and returns the exit code."""
        path = self.out / "report.json"
        if not path.exists():
            say(f"FAILED: the load did not run; see {self.out / 'locust.log'}")
            return EXIT_FAILED
        result = json.loads(path.read_text())
        samples = [ClusterSample(at - result["began_at"], cluster) for at, cluster in self.samples]
        events = [(at - result["began_at"], what) for at, what in self.events]
        if not events:
            self.problems.append(
                f"nothing was drained: there were never two ready {LAYOUTS[self.layout][1]} instances"
            )
        failures = result["summary"]["failures"]
        self.problems += [f"{count} requests: {kind}" for kind, count in failures.items()]
        rows = [{"at_s": round(sample.at_s, 3), **sample.cluster} for sample in samples]
        (self.out / "samples.json").write_text(json.dumps({"events": events, "samples": rows}))
        LoadTestReport(result, samples, events, self.problems, commands).write(self.out)
        for problem in self.problems:
            say(f"FAILED: {problem}")
        summary = result["summary"]
        say(f"{summary['ended']} of {summary['planned']} requests ended, {summary['failed']} failed")
        say(f"report: {self.out / 'report.html'}")
        return EXIT_FAILED if self.problems else EXIT_OK
