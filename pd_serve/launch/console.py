"""What a person sees: steps with their time, warnings, the banner at the end of the start."""

import json
import logging
import time

import rich.console
from rich.panel import Panel
from rich.table import Table

from pd_serve.comm.messages import InstanceInfo
from pd_serve.config import ServeConfig
from pd_serve.observe.logs import is_json

logger = logging.getLogger(__name__)


class Console:
    """Progress on stderr, so that stdout stays free for results. With JSON lines of log, lines of log."""

    def __init__(self) -> None:
        self._console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
        self._begin = time.monotonic()

    def step(self, text: str) -> None:
        if is_json():
            return logger.info("%s", text)
        self._console.print(f"[dim]{time.monotonic() - self._begin:6.1f} s[/dim]  {text}")

    def warn(self, text: str) -> None:
        if is_json():
            return logger.warning("%s", text)
        self._console.print(f"[bold yellow]warning[/bold yellow]  {text}")

    def error(self, text: str) -> None:
        self._console.print(f"[bold red]error[/bold red]  {text}", soft_wrap=True)

    def banner(self, config: ServeConfig, model: str, instances: list[InstanceInfo], *, tls: bool) -> None:
        """Endpoint, model, instances and a line to copy."""
        endpoint = f"http{'s' if tls else ''}://{config.host or '0.0.0.0'}:{config.port}"
        if is_json():
            seconds = time.monotonic() - self._begin
            return logger.info("endpoint %s/v1 serves %s after %.1f s", endpoint, model, seconds)
        body = json.dumps(
            {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}
        )
        key = " -H 'Authorization: Bearer KEY'" if config.api_keys else ""
        table = Table.grid(padding=(0, 2))
        table.add_row("[bold]endpoint[/bold]", f"{endpoint}/v1")
        table.add_row("[bold]model[/bold]", model)
        shown = ", ".join(f"{info.instance_id} (pid {info.pid})" for info in instances)
        table.add_row("[bold]instances[/bold]", shown)
        ready = f"ready after {time.monotonic() - self._begin:.1f} s"
        self._console.print(Panel(table, title="pd-serve", subtitle=ready, expand=False))
        self._console.print("Try it (Ctrl-C ends everything):\n")
        self._console.print(
            f"  curl {endpoint}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'\n",
            markup=False,
        )
