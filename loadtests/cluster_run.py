"""One run on a cluster that is started for it: its problems, its report, its exit code."""

import asyncio
import signal
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.answer import StreamError
from loadtests.checked_load import CheckedLoad
from loadtests.outcome import EXIT_FAILED, EXIT_OK
from loadtests.started_service import ClusterShape, StartedService, started_service
from loadtests.stream_client import AsyncStreamClient
from loadtests.terminal import say
from pd_serve.errors import PdServeError
from pd_serve.launch.signals import end_on
from pd_serve.observe.provenance import provenance, write


@dataclass(kw_only=True)
class ClusterRun(ABC):
    """One run.

    Attributes:
        out: Folder for the report and the log.
        key: API key of the service; "" for none.
        problems: Reasons why the run failed.
        numbers: What was done and measured, for the report.
    """

    shape: ClusterShape
    seed: int
    out: Path
    key: str = ""
    problems: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    @abstractmethod
    async def on_service(self, service: StartedService, client: AsyncStreamClient) -> None:
        """The run itself. Raises: StreamError: The service did not serve at the beginning."""

    @abstractmethod
    def summary(self) -> Iterable[str]:
        """Lines to show at the end."""

    def execute(self) -> int:
        """Runs, writes the report, and shows the problems. Returns the exit code."""
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            asyncio.run(self._run())
        except PdServeError as error:
            self.problems.append(str(error))
        except StreamError as error:
            self.problems.append(error.text)
        except (KeyboardInterrupt, asyncio.CancelledError):
            say("interrupted; all started processes have ended")
            return 130
        report = {"seed": self.seed, "problems": self.problems, **self.numbers}
        write(self.out / "report.json", provenance() | report)
        for line in self.summary():
            say(line)
        for problem in self.problems:
            say(f"FAILED: {problem}")
        say(f"report: {self.out / 'report.json'}")
        return EXIT_FAILED if self.problems else EXIT_OK

    async def _run(self) -> None:
        """Returns after all started processes have ended."""
        end_on(signal.SIGINT, signal.SIGTERM)
        say(f"starting a cluster; its output: {self.out / 'server.log'}")
        async with started_service(self.shape, self.out) as service:
            say(service.command)
            async with AsyncStreamClient(service.url, self.key or None) as client:
                await self.on_service(service, client)

    # ---- what more than one kind of run checks

    def check_streams(self, load: CheckedLoad) -> None:
        """Counts failed streams as problems, by kind."""
        for kind, count in Counter(one.outcome.error for one in load.failed()).items():
            self.problems.append(f"{count} of {len(load.records)} streams: {kind}")

    async def check_integrity(self, client: AsyncStreamClient) -> None:
        """Takes over what `GET /cluster/integrity` finds."""
        with suppress(StreamError):
            violations = (await client.json("/cluster/integrity"))["violations"]
            self.problems += [f"integrity: {violation}" for violation in violations]
            return
        self.problems.append("GET /cluster/integrity failed")
