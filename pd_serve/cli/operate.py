"""`pd-serve status`, `drain`, `scale`, `restart`, `migrate`, `integrity`: commands for a running service."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pd_serve.cli import service_client
from pd_serve.cli import status as status_tables
from pd_serve.cli.service_client import ServiceClient
from pd_serve.errors import InvalidRequestError
from pd_serve.launch.console import Console
from pd_serve.launch.credentials import ADMIN_VARIABLE

app = typer.Typer(rich_markup_mode=None)

Url = Annotated[str, typer.Option(help="URL of the service.")]
ApiKey = Annotated[str | None, typer.Option(help="Its API key.", envvar="VLLM_API_KEY")]
AdminKey = Annotated[
    str | None, typer.Option(help="Its key for /cluster, if it has one.", envvar=ADMIN_VARIABLE)
]


def for_service(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command whose first parameter is a service the options that say which one."""

    @functools.wraps(command)
    def with_options(url: str, api_key: str | None, admin_key: str | None, **others: Any) -> None:
        command(ServiceClient(url, admin_key or api_key), **others)

    _, *own = inspect.signature(command).parameters.values()
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for name, annotation, default in (
            ("url", Url, "http://127.0.0.1:8000"),
            ("api_key", ApiKey, None),
            ("admin_key", AdminKey, None),
        )
    ]
    with_options.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    with_options.__annotations__ = {option.name: option.annotation for option in (*own, *options)}
    return with_options


@app.command()
@for_service
def status(
    service: ServiceClient,
    request: Annotated[
        str | None, typer.Option(help="Show one request, by its X-Request-Id or the id of its answer.")
    ] = None,
) -> None:
    """Show the instances and migrations of a running service, or the stages of one request."""
    if request is not None:
        status_tables.show_request(service, request)
    else:
        status_tables.show(service)


@app.command()
@for_service
def drain(
    service: ServiceClient,
    instance: Annotated[
        str | None, typer.Argument(metavar="INSTANCE", help="Its id, as `pd-serve status` shows it.")
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="Drain all instances of the machine with this host name.")
    ] = None,
    wait: Annotated[float, typer.Option(help="With --node: seconds to wait until they are empty.")] = 0.0,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the instance when it is empty.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Let the instance take requests again.")] = False,
) -> None:
    """Keep new requests from an instance, and move its running ones away."""
    if node is not None and instance is None and not (stop or undo):
        service_client.drain_node(service, Console(), node, wait_s=wait)
    elif instance is not None and node is None:
        service_client.drain(service, Console(), instance, stop=stop, undo=undo)
    else:
        raise InvalidRequestError("give an instance, or --node alone")


@app.command()
@for_service
def scale(
    service: ServiceClient,
    sizes: Annotated[list[str], typer.Argument(metavar="ROLE=N...", help="Such as decode=4.")],
) -> None:
    """Set the number of instances of a role: starts instances, or drains and stops them."""
    service_client.scale(service, Console(), service_client.parse_sizes(sizes))


@app.command()
@for_service
def restart(service: ServiceClient) -> None:
    """Replace all instances by new ones, one after another, while requests go on."""
    service_client.restart(service, Console())


@app.command()
@for_service
def migrate(
    service: ServiceClient,
    request: Annotated[
        str, typer.Argument(metavar="REQUEST", help="Its X-Request-Id, or the id of its answer.")
    ],
    destination: Annotated[
        str, typer.Argument(metavar="DESTINATION", help="Id of the instance to move it to.")
    ],
) -> None:
    """Move a running request to another instance."""
    service_client.migrate(service, Console(), request, destination)


@app.command()
@for_service
def integrity(service: ServiceClient) -> None:
    """Check the invariants of all instances."""
    service_client.check_integrity(service, Console())
