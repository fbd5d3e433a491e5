"""Cuts a command line into MODEL, our flags and vLLM's, and refuses unknown ones, without importing vLLM."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pd_serve.errors import InvalidRequestError
from pd_serve.launch.flag_table import FlagSpec, flag_table
from router.load import ROLES

SAME_EVERYWHERE = re.compile(
    r"""
    # The model: what is computed, and what the front end tokenizes.
    model|model_impl|model_class_overrides|model_loader_extra_config|load_format|runner|convert
    |hf_config_path|hf_overrides|config_format|revision|code_revision|trust_remote_code|tokenizer.*
    |skip_tokenizer_init|dtype|quantization|quantization_config|max_model_len|disable_sliding_window
    |served_model_name|generation_config|override_generation_config
    # What a KV block holds. Over how many tensor-parallel ranks its heads are spread may differ.
    |block_size|kv_cache_dtype.*|kv_sharing_fast_prefill|attention_backend|attention_config
    |disable_hybrid_kv_cache_manager|mamba_block_size|mamba_.*cache_dtype|mamba_cache_mode
    |speculative_config|spec_.*|(pipeline|decode_context|prefill_context)_parallel_size
    |[dp]?cp_kv_cache_interleave_size
    # What a request may ask for, wherever it is.
    |enable_lora|max_lora_rank|lora_dtype|max_logprobs|logprobs_mode|logits_processors
    |structured_outputs_config|reasoning_parser|reasoning_parser_plugin|scheduling_policy
    """,
    re.VERBOSE,
)
"""Engine settings that a request meets again after a migration, so they cannot differ by role."""

NOT_OURS = re.compile(
    "headless|api_server_count|grpc|grpc_port|uds|data_parallel_.*|dp_supervisor_.*|nnodes|node_rank|"
    "master_addr|master_port|enable_elastic_ep|elastic_ep_.*|enable_fault_tolerance|fault_tolerance_config|"
    "scheduler_cls|enable_ssl_refresh"
)
"""Settings for things that pd-serve does in its own way: processes, nodes, scheduling, sockets."""

ON_THE_COMMAND_LINE = {
    "model": "name the model as an argument without a flag",
    "host": "is a flag of pd-serve itself and cannot stand in a --config file",
    "port": "is a flag of pd-serve itself and cannot stand in a --config file",
}
"""Settings that are needed before vLLM's flags are read."""


@dataclass(frozen=True, slots=True)
class EngineFlag:
    """One of vLLM's flags with its values.

    Attributes:
        tokens: Name and values as vLLM's parser takes them, without the prefix of a role.
        role: The role whose instances it is for; None for all.
    """

    spec: FlagSpec
    tokens: list[str]
    role: str | None

    @property
    def setting(self) -> str:
        """What it sets; `--a.b` and `--a.c` set different things."""
        name = self.tokens[0].split("=", 1)[0]
        return name if "." in name else self.spec.dest


@dataclass(slots=True)
class CommandLine:
    """A command line in parts.

    Attributes:
        positionals: Arguments without a flag.
        own: Our flags, each value with its flag's name in front.
        engine: vLLM's flags.
        engine_args: The same as they were written.
    """

    positionals: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    engine: list[EngineFlag] = field(default_factory=list)
    engine_args: list[str] = field(default_factory=list)


def cut(args: Sequence[str], own: Mapping[str, int | str] | None = None) -> CommandLine:
    """Cuts a command line.

    Args:
        args: Flags in any of vLLM's forms: `--flag value`, `--flag=value`, `--no-flag`,
            `--json-flag.key value`, `-tp 2`, underscores for dashes. `--` ends the values of a flag with
            several, and all that follows is positional.
        own: Our flags, with the number of their values as in `FlagSpec.nargs`.

    Raises:
        InvalidRequestError: With one line that says what to change.
    """
    own = own or {}
    line = CommandLine()
    position = 0
    while position < len(args):
        token, position = args[position], position + 1
        if token == "--":
            line.positionals += args[position:]
            break
        if not _is_flag(token):
            line.positionals.append(token)
            continue
        written, equals, value = token.partition("=")
        name = written.replace("_", "-")
        flag = None if name in own else _engine_flag(written, equals, value, own)
        nargs = own[name] if flag is None else flag.spec.nargs
        equals = equals or ("=" if flag is not None and "=" in flag.tokens[0] else "")  # -O2
        values = [] if equals else list(_values(args, position, nargs))
        position += len(values)
        if not values and not equals and nargs in (1, "+"):
            number = "one argument" if nargs == 1 else "at least one argument"
            raise InvalidRequestError(f"{written}: expected {number}")
        if equals and nargs == 0:
            raise InvalidRequestError(f"{written} takes no value, and was given {value!r}")
        if flag is not None:
            flag.tokens.extend(values)
            line.engine.append(flag)
            line.engine_args += [token, *values]
        elif nargs == 0:
            line.own.append(name)
        else:
            line.own += [f"{name}={one}" for one in ([value] if equals else values)]
    return line


def _values(args: Sequence[str], position: int, nargs: int | str) -> Iterator[str]:
    most = nargs if isinstance(nargs, int) else 1 if nargs == "?" else len(args)
    for token in args[position : position + most]:
        if _is_flag(token):
            return
        yield token


def _engine_flag(written: str, equals: str, value: str, own: Mapping[str, int | str]) -> EngineFlag:
    path, dot, keys = written.partition(".")
    name = path.replace("_", "-") if path.startswith("--") else path
    if level := re.fullmatch(r"-O(\d?)", name):
        name, equals, value = "--optimization-level", "=" if value or level[1] else "", value or level[1]
    known = flag_table()
    role = None
    if name not in known:
        role = next((role for role in ROLES if name.startswith(f"--{role}-")), None)
        name = "--" + name.removeprefix(f"--{role}-") if role else name
    spec = known.get(name)
    if spec is None:
        raise InvalidRequestError(_unknown(written.replace("_", "-"), own))
    if role is None and spec.dest in ON_THE_COMMAND_LINE:
        raise InvalidRequestError(f"{written}: {ON_THE_COMMAND_LINE[spec.dest]}")
    if NOT_OURS.fullmatch(spec.dest):
        raise InvalidRequestError(f"{written} is not a flag of pd-serve, which does this in its own way")
    if role and not spec.of_engine:
        raise InvalidRequestError(f"{written}: {name} is a flag of the API server, not of the instances")
    if role and SAME_EVERYWHERE.fullmatch(spec.dest):
        raise InvalidRequestError(f"{written}: must be the same on all instances; use {name}")
    return EngineFlag(spec, [name + dot + keys + equals + value], role)


def _is_flag(token: str) -> bool:
    number = re.fullmatch(r"-\d+|-\d*\.\d+", token)
    return token.startswith("-") and token != "-" and number is None


def _unknown(name: str, own: Mapping[str, int | str]) -> str:
    role = next((role for role in ROLES if name.startswith(f"--{role}-")), None)
    known = [*own]
    for option, spec in flag_table().items():
        if option.startswith("--") and not NOT_OURS.fullmatch(spec.dest):
            known.append(option)
            if role and spec.of_engine and not SAME_EVERYWHERE.fullmatch(spec.dest):
                known.append(f"--{role}-{option[2:]}")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"unknown flag {name}" + (f"; did you mean {close[0]}?" if close else "")
