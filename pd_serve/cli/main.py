"""The command line `pd-serve`."""

import asyncio
import importlib.metadata
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from pd_serve.cli import operate, plan, policies, simulate
from pd_serve.cli.flags import ENGINE_ARGS, EngineCommand, Model, given, with_settings
from pd_serve.comm.membership import MANAGER
from pd_serve.config import ServeConfig
from pd_serve.errors import InvalidRequestError, PdServeError
from pd_serve.launch.console import Console
from pd_serve.launch.credentials import with_credentials
from pd_serve.observe.logs import choose_format, configure_logging, outlive_streams

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pd-serve {importlib.metadata.version('pd-serve')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Prefill-decode disaggregated LLM serving by live migration, on stock vLLM."""


@app.command(cls=EngineCommand)
@with_settings
def serve(context: typer.Context, model: Model = None, **settings: Any) -> None:
    """Serve a model behind one OpenAI-compatible endpoint.

    MODEL is a directory, a hub name, or a demo model: 'smollm2' (the default) or 'tiny', which starts fastest
    and generates nonsense.

    All flags of vLLM's engine and API server are accepted under vLLM's names. An engine flag applies to all
    instances or, with the name of a role in front, to those of one role: --max-model-len 4096
    --prefill-max-num-batched-tokens 1024. `vllm serve --help` lists them.

    Each flag below can be set in the environment as well: PD_SERVE_MAX_BODY_BYTES for --max-body-bytes. API
    keys are also taken from VLLM_API_KEY.
    """
    console = Console()
    named = {} if model is None else {"model": model}
    config = ServeConfig(**named, **given(settings), flags=tuple(context.meta[ENGINE_ARGS]))
    outlive_streams()
    choose_format(config.log_format)
    config = with_credentials(config, console.warn)
    from pd_serve.launch import serve as service

    _run(service.run(config, console), MANAGER)


app.add_typer(operate.app)

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure on this machine.")
app.add_typer(bench, name="bench")
app.add_typer(simulate.app, name="simulate")
app.command()(plan.plan)
app.command()(policies.policies)


@bench.callback()
def _bench() -> None:
    """Makes `profile` a sub-command: Typer takes the only command of a group for the group."""


@bench.command("profile", cls=EngineCommand)
def bench_profile(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="CSV file to write, for --cost-model of serve and simulate.")],
    model: Model = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
    instances: Annotated[int, typer.Option(min=1, help="Instances that will share this machine.")] = 1,
    seconds: Annotated[float, typer.Option(min=1, help="Time to measure, after the engine's start.")] = 60.0,
) -> None:
    """Measure how long the steps of a real engine take, as a cost model. Accepts vLLM's engine flags."""
    from pd_serve.profiling import engine_profile

    flags = list(context.meta[ENGINE_ARGS])
    _run(
        engine_profile.run(
            model or "tiny", out, flags, json_path=json_file, num_instances=instances, seconds=seconds
        ),
        "profile",
    )


def _run(work: Coroutine[Any, Any, None], process: str) -> None:
    import uvloop

    configure_logging(process)
    # Not closed: that would wait for threads which still start Ray or import vLLM. The process ends next.
    asyncio.Runner(loop_factory=uvloop.new_event_loop).run(work)


def main() -> None:
    """Entry point. Every expected error is one line, and exit code 1 or 2."""
    console = Console()
    code = 0
    try:
        code = app(standalone_mode=False) or 0
    except PdServeError as error:
        console.error(str(error))
        code = 2 if isinstance(error, InvalidRequestError) else 1
    except typer.Exit as exit_:
        code = exit_.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        code = 141
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of Typer
            console.error(error.format_message())
            code = 2
        elif os.environ.get("PD_SERVE_LOG_LEVEL", "").upper() == "DEBUG":
            raise
        else:
            text = " ".join(str(error).split()) or "no reason given"
            console.error(f"{type(error).__name__}: {text} (PD_SERVE_LOG_LEVEL=DEBUG shows the traceback)")
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Interpreter shutdown with torch loaded takes two seconds and frees nothing that matters.
    os._exit(code)
