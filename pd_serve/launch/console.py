"""Progress and warnings for the operator, and the banner at the end of the start."""

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence

import rich.console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from pd_serve.comm.membership import InstanceInfo
from pd_serve.observe.logs import is_json

logger = logging.getLogger(__name__)

#: Instances that the banner names.
MAX_SHOWN = 16


def instances_shown(instances: Sequence[InstanceInfo]) -> str:
    """The instances with their process ids; only numbers if there are many."""
    if len(instances) <= MAX_SHOWN:
        return ", ".join(f"{info.instance_id} (pid {info.pid})" for info in instances)
    by_role = Counter(info.role for info in instances)
    roles = ", ".join(f"{number} {role}" for role, number in by_role.items())
    return f"{roles}, in {len({(info.node, info.pid) for info in instances})} processes"


class LogProgress:
    """Progress as log lines, for a process without a terminal."""

    def step(self, text: str) -> None:
        logger.info("%s", text)

    def warn(self, text: str) -> None:
        logger.warning("%s", text)


class Console:
    """Progress on stderr, so that stdout stays free for results. With the log format JSON: as log lines."""

    def __init__(self) -> None:
        self._console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
        self._begin = time.monotonic()

    def step(self, text: str) -> None:
        if is_json():
            return logger.info("%s", text)
        self._print(f"{time.monotonic() - self._begin:6.1f} s", "dim", text)

    def warn(self, text: str) -> None:
        if is_json():
            return logger.warning("%s", text)
        self._print("warning", "bold yellow", text)

    def error(self, text: str) -> None:
        self._print("error", "bold red", text)

    def _print(self, label: str, style: str, text: str) -> None:
        self._console.print(label, style=style, end="  ")
        self._console.print(text, markup=False)

    def banner(
        self,
        url: str,
        model: str,
        instances: Sequence[InstanceInfo],
        *,
        needs_key: bool,
        no_migration: str | None = None,
    ) -> None:
        """Shows the endpoint and a command to try it.

        Args:
            url: Such as "http://127.0.0.1:8000".
            model: Its name in the API.
            no_migration: What it means that requests cannot move, and why; None if they can.
        """
        seconds = time.monotonic() - self._begin
        if is_json():
            logger.info("endpoint %s/v1 serves %s after %.1f s", url, model, seconds)
            if no_migration is not None:
                logger.warning("migration is off: %s", no_migration)
            return
        table = Table.grid(padding=(0, 2))
        rows = (("endpoint", f"{url}/v1"), ("model", model), ("instances", instances_shown(instances)))
        for name, value in rows:
            table.add_row(f"[bold]{name}[/bold]", value)
        if no_migration is not None:
            text = f"[bold yellow]off: {escape(no_migration)}[/bold yellow]"
            table.add_row("[bold]migration[/bold]", text)
        ready = f"ready after {seconds:.1f} s"
        self._console.print(Panel(table, title="pd-serve", subtitle=ready, expand=False))
        body = json.dumps(
            {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}
        )
        key = " -H 'Authorization: Bearer KEY'" if needs_key else ""
        self._console.print("Try it (Ctrl-C stops the service):\n")
        self._console.print(
            f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'\n",
            markup=False,
        )


def service_url(host: str, port: int, *, tls: bool) -> str:
    """Where clients of this machine find the service. An empty host stands for all interfaces."""
    shown = f"[{host}]" if ":" in host else host or "0.0.0.0"
    return f"http{'s' if tls else ''}://{shown}:{port}"
