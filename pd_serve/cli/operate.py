"""`pd-serve status`, `drain`, `scale`, `restart`, `migrate`, `integrity`: commands for a running service."""

from typing import Annotated

import typer

from pd_serve.cli import service_client
from pd_serve.cli import status as status_tables
from pd_serve.cli.service_client import ServiceClient
from pd_serve.errors import InvalidRequestError, PdServeError
from pd_serve.launch.console import Console
from pd_serve.launch.credentials import ADMIN_VARIABLE

app = typer.Typer(rich_markup_mode=None)

Url = Annotated[str, typer.Option(help="URL of the service.")]
ApiKey = Annotated[str | None, typer.Option(help="Its API key.", envvar="VLLM_API_KEY")]
AdminKey = Annotated[
    str | None, typer.Option(help="Its key for /cluster, if it has one.", envvar=ADMIN_VARIABLE)
]


DEFAULT_URL = "http://127.0.0.1:8000"


@app.command()
def status(
    request: Annotated[
        str | None, typer.Option(help="Show one request, by its X-Request-Id or the id of its answer.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    admin_key: AdminKey = None,
) -> None:
    """Show the instances and migrations of a running service, or the stages of one request."""
    service = ServiceClient(url, admin_key or api_key)
    if request is not None:
        status_tables.show_request(service, request)
    else:
        status_tables.show(service)


@app.command()
def drain(
    instance: Annotated[
        str | None, typer.Argument(metavar="INSTANCE", help="Its id, as `pd-serve status` shows it.")
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="Drain all instances of the machine with this host name.")
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0, help="With --node: seconds to wait until they are empty.")
    ] = 0.0,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the instance when it is empty.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Let the instance take requests again.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    admin_key: AdminKey = None,
) -> None:
    """Keep new requests from an instance, and move its running ones away."""
    service, console = ServiceClient(url, admin_key or api_key), Console()
    if node is not None and instance is None and not (stop or undo):
        service_client.drain_node(service, console, node, wait_s=wait)
    elif instance is not None and node is None and not wait and not (stop and undo):
        service.post("drain", {"instance": instance, "stop": stop, "draining": not undo})
        what = "takes requests again" if undo else "drains, and stops when it is empty" if stop else "drains"
        console.step(f"{instance} {what}; see pd-serve status")
    else:
        raise InvalidRequestError(
            "give an instance, with --stop or --undo if need be, or --node, with --wait"
        )


@app.command()
def scale(
    sizes: Annotated[list[str], typer.Argument(metavar="ROLE=N...", help="Such as decode=4.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    admin_key: AdminKey = None,
) -> None:
    """Set the number of instances of a role: starts instances, or drains and stops them."""
    service, console = ServiceClient(url, admin_key or api_key), Console()
    wanted = service_client.parse_sizes(sizes)
    service.post("scale", wanted)
    shown = ", ".join(f"{role}={size}" for role, size in wanted.items())
    console.step(f"scaling to {shown}; see pd-serve status")


@app.command()
def restart(
    cancel: Annotated[bool, typer.Option("--cancel", help="End the restart that is under way.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    admin_key: AdminKey = None,
) -> None:
    """Replace all instances by new ones, one after another, while requests continue."""
    service, console = ServiceClient(url, admin_key or api_key), Console()
    if cancel:
        service.post("restart", {"cancel": True})
        console.step("the restart is cancelled; see pd-serve status")
    else:
        service_client.restart(service, console)


@app.command()
def migrate(
    request: Annotated[
        str, typer.Argument(metavar="REQUEST", help="Its X-Request-Id, or the id of its answer.")
    ],
    destination: Annotated[
        str, typer.Argument(metavar="DESTINATION", help="Id of the instance to move it to.")
    ],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    admin_key: AdminKey = None,
) -> None:
    """Move a running request to another instance."""
    service, console = ServiceClient(url, admin_key or api_key), Console()
    done = service.post("migrate", {"request_id": request, "destination": destination})
    console.step(
        f"{request} runs on {destination}: {done['tokens']} tokens, {done['blocks']} blocks in"
        f" {done['stages']} stages, {done['downtime_ms']:.1f} ms without a token"
    )


@app.command()
def integrity(url: Url = DEFAULT_URL, api_key: ApiKey = None, admin_key: AdminKey = None) -> None:
    """Check the invariants of all instances."""
    service, console = ServiceClient(url, admin_key or api_key), Console()
    if violations := service.get("integrity")["violations"]:
        raise PdServeError("\n".join(violations))
    console.step("all invariants hold")
