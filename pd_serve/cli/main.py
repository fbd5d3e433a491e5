"""The command line: `pd-serve serve`, `status`, `drain`, `scale`, `restart`, `bench`, `simulate`."""

import asyncio
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pd_serve import models
from pd_serve.cli.simulate import app as simulate
from pd_serve.config import (
    DEFAULT_COST_MODEL,
    DEFAULT_POLICY,
    MAX_BODY_BYTES,
    MAX_CONNECTIONS,
    serve_config,
)
from pd_serve.errors import InvalidRequestError, PdServeError
from pd_serve.launch.console import Console
from pd_serve.launch.credentials import (
    ADMIN_VARIABLE,
    SECRET_VARIABLE,
    read_admin_key,
    read_api_keys,
    read_cluster_secret,
)
from pd_serve.observe.logs import choose_format, configure_logging

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

_SERVE_HELP = """Serve a model behind one OpenAI-compatible endpoint.

MODEL comes first: a directory, a hub name, or a demo model ('smollm2', the default, or 'tiny', which is ready
fastest and talks nonsense). Every engine flag of vLLM is taken under vLLM's name, for all instances or, with
a prefix, for one role: --max-model-len 4096 --prefill-max-num-batched-tokens 1024.
"""


@app.callback()
def _root() -> None:
    """Prefill-decode disaggregated LLM serving by live migration, on stock vLLM."""


@app.command(help=_SERVE_HELP, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    prefill: Annotated[int | None, typer.Option(help="Prefill instances. [default: 1]")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode instances. [default: 2]")] = None,
    neutral: Annotated[
        int | None, typer.Option(help="Instances that do both, without disaggregation. [default: 0]")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="How requests are placed and moved: a policy set's name.")
    ] = DEFAULT_POLICY,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Setting of the policy to change.")
    ] = None,
    autoscale_prefill: Annotated[
        str | None, typer.Option(metavar="MIN:MAX", help="Let the scheduler scale the prefill instances.")
    ] = None,
    autoscale_decode: Annotated[
        str | None, typer.Option(metavar="MIN:MAX", help="Let the scheduler scale the decode instances.")
    ] = None,
    autoscale: Annotated[
        str | None, typer.Option(metavar="MIN:MAX", help="Let the scheduler scale the neutral instances.")
    ] = None,
    engine: Annotated[
        Literal["vllm", "simulated"],
        typer.Option(help="What computes: vLLM, or a simulation of it that says random words."),
    ] = "vllm",
    cost_model: Annotated[
        str, typer.Option(help="How fast simulated engines are: a name, or a CSV file of measured steps.")
    ] = DEFAULT_COST_MODEL,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve on; 0 for any free one.")] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="What the API calls the model.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that clients must send; may be given several times.", envvar="VLLM_API_KEY"),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File of such keys, one a line.")] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(help="Key for /cluster, which API keys do not open then.", envvar=ADMIN_VARIABLE),
    ] = None,
    admin_key_file: Annotated[Path | None, typer.Option(help="File of that key.")] = None,
    cluster_secret_file: Annotated[
        Path | None,
        typer.Option(
            help=f"What the processes know each other by, or ${SECRET_VARIABLE}. [default: made up]"
        ),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="What lines of log are.", envvar="PD_SERVE_LOG_FORMAT")
    ] = "text",
    ray_address: Annotated[
        str | None, typer.Option(help="Join this Ray cluster instead of a local one.")
    ] = None,
    max_waiting_requests: Annotated[
        int, typer.Option(help="Requests that may wait for a first token before others get 429.")
    ] = 512,
    max_body_bytes: Annotated[
        int, typer.Option(min=1024, help="Length of a request's body; longer ones get 413.")
    ] = MAX_BODY_BYTES,
    max_connections: Annotated[
        int, typer.Option(min=1, help="Connections of clients at a time; further ones get 503.")
    ] = MAX_CONNECTIONS,
    prefill_resources: Annotated[
        str | None, typer.Option(metavar="JSON", help="Custom resources of Ray for each prefill instance.")
    ] = None,
    decode_resources: Annotated[
        str | None, typer.Option(metavar="JSON", help="The same for each decode instance.")
    ] = None,
    neutral_resources: Annotated[
        str | None, typer.Option(metavar="JSON", help="The same for each neutral instance.")
    ] = None,
    accelerator_type: Annotated[
        str | None, typer.Option(help="Only on machines with this accelerator, as Ray names it.")
    ] = None,
    replace: Annotated[
        bool, typer.Option(help="Start another instance in the place of one that has died.")
    ] = True,
) -> None:
    choose_format(log_format)
    extra = list(context.args)
    model = extra.pop(0) if extra and not extra[0].startswith("-") else models.DEFAULT_MODEL
    console = Console()
    config = serve_config(
        model=model,
        prefill=prefill,
        decode=decode,
        neutral=neutral,
        policy=policy,
        settings=settings or [],
        autoscale_prefill=autoscale_prefill,
        autoscale_decode=autoscale_decode,
        autoscale=autoscale,
        engine=engine,
        cost_model=cost_model,
        host=host,
        port=port,
        served_model_name=served_model_name,
        api_keys=read_api_keys(api_key or [], api_key_file, console.warn),
        admin_key=read_admin_key(admin_key, admin_key_file, console.warn),
        cluster_secret=read_cluster_secret(cluster_secret_file, console.warn),
        ray_address=ray_address,
        max_waiting_requests=max_waiting_requests,
        max_body_bytes=max_body_bytes,
        max_connections=max_connections,
        prefill_resources=prefill_resources,
        decode_resources=decode_resources,
        neutral_resources=neutral_resources,
        accelerator_type=accelerator_type,
        replace=replace,
        engine_flags=extra,
    )
    from pd_serve.launch import serve as service

    _run(service.run(config, console))


Url = Annotated[str, typer.Option(help="Where the service is.")]
Key = Annotated[str | None, typer.Option(help="Its key.", envvar="VLLM_API_KEY")]
AdminKey = Annotated[
    str | None, typer.Option(help="Its key for /cluster, if it has one.", envvar=ADMIN_VARIABLE)
]
DEFAULT_URL = "http://127.0.0.1:8000"


@app.command()
def status(
    request: Annotated[
        str | None, typer.Option(help="Show a request's way, by its X-Request-Id or the id of its answer.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    admin_key: AdminKey = None,
) -> None:
    """Show the instances and migrations of a running service, or where one of its requests has been."""
    from pd_serve.cli.status import show, show_request

    if request is not None:
        show_request(url, admin_key or api_key, request)
    else:
        show(url, admin_key or api_key)


@app.command()
def drain(
    instance: Annotated[str | None, typer.Argument(help="Its id, as `pd-serve status` shows it.")] = None,
    node: Annotated[
        str | None, typer.Option(help="All instances of the machine with this host name, instead of one.")
    ] = None,
    wait: Annotated[float, typer.Option(help="With --node: seconds to wait until they are empty.")] = 0.0,
    stop: Annotated[bool, typer.Option("--stop", help="Stop it when it is empty.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Use it again.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    admin_key: AdminKey = None,
) -> None:
    """Let an instance take nothing new, and move away what it has."""
    from pd_serve.cli import operate as control

    service = control.ServiceClient(url, admin_key or api_key)
    if node is not None and instance is None and not (stop or undo):
        control.drain_node(service, Console(), node, wait_s=wait)
    elif instance is not None and node is None:
        control.drain(service, Console(), instance, stop=stop, undo=undo)
    else:
        raise InvalidRequestError("give an instance, or --node alone")


@app.command()
def scale(
    sizes: Annotated[list[str], typer.Argument(metavar="ROLE=N...", help="Such as decode=4.")],
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    admin_key: AdminKey = None,
) -> None:
    """Start instances, or drain and stop them, until there are so many of a role."""
    from pd_serve.cli import operate as control

    control.scale(control.ServiceClient(url, admin_key or api_key), Console(), control.parse_sizes(sizes))


@app.command()
def restart(url: Url = DEFAULT_URL, api_key: Key = None, admin_key: AdminKey = None) -> None:
    """Put a new instance in the place of each, one after another, while requests go on."""
    from pd_serve.cli import operate as control

    control.restart(control.ServiceClient(url, admin_key or api_key), Console())


bench = typer.Typer(no_args_is_help=True, help="Measure on this machine, as ratios side by side in one run.")
app.add_typer(bench, name="bench")
app.add_typer(simulate, name="simulate")
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")]


@bench.command("profile", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench_profile(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="CSV file to write, for --cost-model of serve and simulate.")],
    json_file: JsonFile = None,
    instances: Annotated[int, typer.Option(min=1, help="Instances that are to share this machine.")] = 1,
    seconds: Annotated[float, typer.Option(min=1, help="Time to measure, once the engine runs.")] = 60.0,
) -> None:
    """How long a real engine's steps take: pd-serve bench profile [MODEL] --out FILE. Takes vLLM's flags."""
    extra = list(context.args)
    model = extra.pop(0) if extra and not extra[0].startswith("-") else "tiny"
    from pd_serve.profiling import engine_profile as profile

    _run(profile.run(model, out, extra, json_path=json_file, num_instances=instances, seconds=seconds))


def _run(work: Coroutine[Any, Any, None]) -> None:
    import uvloop

    configure_logging("api")
    # Not closed: that would wait for threads which still start Ray or import vLLM. The process ends next.
    asyncio.Runner(loop_factory=uvloop.new_event_loop).run(work)


def main() -> None:
    """Entry point. Every expected error is one line, and exit code 1 or 2."""
    console = Console()
    code = 0
    try:
        app(standalone_mode=False)
    except PdServeError as error:
        console.error(str(error))
        code = 2 if isinstance(error, InvalidRequestError) else 1
    except typer.Exit as exit_:
        code = exit_.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors have it
            raise
        console.error(error.format_message())
        code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    # Interpreter shutdown with torch loaded takes two seconds and frees nothing that matters.
    os._exit(code)
