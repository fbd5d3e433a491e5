"""`pd-serve serve` with one simulated engine whose steps all take the same time."""

from collections.abc import Mapping
from pathlib import Path

from loadtests.servers import HOST, MODEL, ServerCommand, script


def write_step_table(folder: Path, step_ms: float) -> Path:
    """Writes a table for `--cost-model` in which every step takes `step_ms`, and returns its path."""
    rows = [f"prefill,1,{n},0,{step_ms}" for n in (16, 128, 512)]
    rows += [f"decode,{n},{n},{n * 100},{step_ms}" for n in (1, 8, 64)]
    path = folder / "steps.csv"
    path.write_text("\n".join(["phase,batch_size,new_tokens,context_tokens,ms", *rows]) + "\n")
    return path


def simulated_server(
    name: str, cost_model: Path, port: int, environment: Mapping[str, str] | None = None
) -> ServerCommand:
    """The command line of the server."""
    flags = ["--neutral=1", "--api-servers=1", "--engine=simulated", f"--cost-model={cost_model}"]
    command = [script("pd-serve"), "serve", MODEL, f"--host={HOST}", f"--port={port}", *flags]
    return ServerCommand(name, command, port, environment or {})
