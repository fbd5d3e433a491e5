"""vLLM's command line, under vLLM's names, with overrides per role.

`--max-num-seqs 64` is for every instance, `--prefill-max-num-seqs 8` for the prefill instances only. A flag
that vLLM itself knows in full (`--prefill-schedule-interval`) stays vLLM's. vLLM's own parser reads and
checks all values; it is imported on the first `parse`, which takes seconds, not with this module.
"""

import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pd_serve.config import ServeConfig
from pd_serve.errors import InvalidRequestError
from pd_serve.launch.command_line import EngineFlag, cut
from pd_serve.launch.server_flags import check_server
from pd_serve.launch.vllm_parser import as_invalid_request, defaults_of_vllm, engine_settings, parser
from pd_serve.platform.placement import num_workers
from router.load import ROLES

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

CHANGED_DEFAULTS: Mapping[str, Any] = {
    # A request keeps one name from the client to every instance it visits: in the answer's headers too.
    "enable_request_id_headers": True,
    # /load answers with the number of requests in progress instead of 0.
    "enable_server_load_tracking": True,
    # vLLM takes `priority` in the body in any case, but its default policy (fcfs) ignores it.
    "scheduling_policy": "priority",
    # One line per request, and uvicorn's start and stop messages, would bury those of the cluster.
    "disable_uvicorn_access_log": True,
    "uvicorn_log_level": "warning",
}
"""Where the service's defaults differ from vLLM's, and why. Flags override them."""

#: Flags of pd-serve. Names of the model may stand among vLLM's, whose flag takes several, too.
OWN = {
    f"--{name.replace('_', '-')}" for name, flag in ServeConfig.model_fields.items() if flag.json_schema_extra
} - {"--served-model-name"}

#: vLLM's front end sends the data of an image once, and afterwards its hash only, if it believes that it is
#: the only one and has one engine. With several API servers it always sends the data, which is right for
#: several engines, too. Source: vllm/multimodal/cache/factories.py, _get_cache_type.
SEVERAL_API_SERVERS = 2


@dataclass(frozen=True, slots=True)
class ParsedFlags:
    """A checked command line.

    Attributes:
        server: vLLM's API server namespace (it holds the engine settings for all roles as well). Some of its
            values are resolved by `server_config` only.
    """

    server: Namespace
    _by_role: Mapping[str, Namespace] = field(repr=False)

    def engine(self, role: str) -> dict[str, Any]:
        """Arguments of `AsyncEngineArgs` for a role: those that differ from vLLM's defaults."""
        settings, defaults = vars(self._by_role[role]), vars(defaults_of_vllm())
        names = engine_settings() & settings.keys()
        arguments = {name: settings[name] for name in sorted(names) if settings[name] != defaults.get(name)}
        return arguments | {"mm_processor_cache_gb": 0.0}  # API servers have it: `SEVERAL_API_SERVERS`

    def workers(self, role: str) -> int:
        """Processes, or GPUs, that compute a step of a role's engines."""
        return num_workers(self.engine(role))

    def engine_args(self, role: str) -> "AsyncEngineArgs":
        """The same as vLLM's own object."""
        from vllm.engine.arg_utils import AsyncEngineArgs

        with as_invalid_request():
            return AsyncEngineArgs(**self.engine(role))

    def engine_config(self, role: str) -> "VllmConfig":
        """vLLM's resolved configuration of a role's engines; reads the model's own.

        Raises:
            InvalidRequestError: With one line that says what to change.
        """
        with as_invalid_request():
            return self.engine_args(role).create_engine_config()

    def server_config(self) -> "VllmConfig":
        """vLLM's resolved configuration of an API server, made of `server` itself.

        As in vLLM's own start, the two share their nested configurations: what is resolved in one, such as
        the reasoning parser of `--reasoning-parser` or of the model, is what the serving layer reads in the
        other.

        The first time a user's machine sees a model architecture, vLLM starts a process of its own to look
        at it (10 s) and remembers what it saw. Calling this before instances are started spares each of
        them the same.

        Raises:
            InvalidRequestError: With one line that says what to change.

        Source: vllm/entrypoints/launchers/api_server/entry.py, main and build_async_engine_client.
        """
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.logger import configure_logging_from_args
        from vllm.usage.usage_lib import UsageContext

        with as_invalid_request():
            configure_logging_from_args(self.server)
            engine_args = AsyncEngineArgs.from_cli_args(self.server)
            engine_args._api_process_count = SEVERAL_API_SERVERS
            return engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)


def parse(
    extra_args: list[str],
    defaults: Mapping[str, Any],
    role_defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> ParsedFlags:
    """Read a command line that has no positional arguments.

    Args:
        extra_args: Flags in the forms that `pd_serve.launch.command_line.cut` takes, and `--config FILE`.
        defaults: Values to use where the command line says nothing, as vLLM's namespace holds them,
            e.g. `{"model": path, "max_num_seqs": 16}`. They come before `CHANGED_DEFAULTS`.
        role_defaults: The same for one role each, where the command line has it for neither this role nor
            all: `{"prefill": {"max_num_batched_tokens": 512}}`.

    Raises:
        InvalidRequestError: With one line that says what to change.
    """
    from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction

    base = {**CHANGED_DEFAULTS, **defaults}
    by_role_base = {role: {**base, **(role_defaults or {}).get(role, {})} for role in ROLES}
    unknown = set().union(*by_role_base.values()) - vars(defaults_of_vllm()).keys()
    if unknown:
        raise ValueError(f"vLLM has no setting {', '.join(sorted(unknown))}")
    line = cut(_with_config_file(extra_args))
    if line.positionals:
        raise InvalidRequestError(f"unexpected argument {line.positionals[0]!r}")
    flags = line.engine
    shared = [flag for flag in flags if flag.role is None]
    server = _read(shared, base)
    check_server(server)
    by_role: dict[str, Namespace] = {}
    for role in ROLES:
        own = [flag for flag in flags if flag.role == role]
        replaced = {flag.setting for flag in own}
        kept = [flag for flag in shared if flag.setting not in replaced]
        by_role[role] = _read(kept + own, by_role_base[role], role)
    for namespace in (server, *by_role.values()):
        propagate_flash_late_interaction(server, namespace)
        if (plugin := Path(namespace.reasoning_parser_plugin or "")).is_file():
            namespace.reasoning_parser_plugin = str(plugin.resolve())  # instances may run elsewhere
    parsed = ParsedFlags(server, by_role)
    for role in ROLES:
        parsed.engine_args(role)  # has checks of its own
    return parsed


def _read(flags: Iterable[EngineFlag], base: Mapping[str, Any], role: str | None = None) -> Namespace:
    """Let vLLM's parser read flags, the last one of a kind winning, on top of `base`."""
    last: dict[Any, EngineFlag] = {}
    for position, flag in enumerate(flags):
        repeatable = "." in flag.setting or flag.spec.repeatable
        key = position if repeatable else flag.setting
        last.pop(key, None)
        last[key] = flag
    tokens = [token for flag in last.values() for token in flag.tokens]
    # vLLM changes configurations in place, and its parser gives every namespace the same default objects.
    unset = Namespace(**{**deepcopy(vars(defaults_of_vllm())), **base})
    try:
        with as_invalid_request():
            namespace: Namespace = parser().parse_args(tokens, unset)
    except InvalidRequestError as error:
        # The flags for all roles have been read before, so it is one of the role's own.
        raise InvalidRequestError(re.sub("^--", f"--{role}-", str(error)) if role else str(error)) from error
    if namespace.model_tag is not None:
        raise InvalidRequestError(f"unexpected argument {namespace.model_tag!r}")
    _choose_executor(namespace)
    return namespace


def _choose_executor(namespace: Namespace) -> None:
    """Several workers of an engine are child processes of their instance.

    vLLM would choose Ray for them, as an instance is in a placement group.
    """
    backend = namespace.distributed_executor_backend
    if backend in ("ray", "external_launcher"):
        raise InvalidRequestError(
            f"--distributed-executor-backend {backend}: an instance's workers are its child processes (mp)"
        )
    if num_workers(vars(namespace)) > 1 and backend in (None, "uni"):
        namespace.distributed_executor_backend = "mp"


def _with_config_file(args: list[str]) -> list[str]:
    """Put the flags of `--config FILE` in front, where the command line's own override them."""
    rest = list(args)
    from_file: list[str] = []
    while (
        at := next((i for i, arg in enumerate(rest) if re.match(r"--config(=|$)", arg)), None)
    ) is not None:
        _, equals, path = rest.pop(at).partition("=")
        if not equals:
            path = rest.pop(at) if at < len(rest) else ""
        if not Path(path).is_file():
            raise InvalidRequestError(f"--config: no such file: {path or 'none given'}")
        tokens = _read_config_file(path)
        refuse_own(tokens)
        from_file += tokens
    return from_file + rest


def _read_config_file(path: str) -> list[str]:
    try:
        with as_invalid_request():
            return list(parser().load_config_file(path))
    except Exception as error:  # vLLM takes for granted that it is YAML, and that something is in it
        known = isinstance(error, InvalidRequestError)
        why = " ".join(str(error).split()) if known else "must be YAML with one setting a line, KEY: VALUE"
        raise InvalidRequestError(f"--config {path}: {why}") from error


def refuse_own(tokens: Iterable[str]) -> None:
    """Refuses flags of pd-serve among vLLM's, where they come from another place than the command line.

    They would be unknown to vLLM, or have an effect on it alone: keys without names and limits.
    """
    flags = (token.partition("=")[0].replace("_", "-") for token in tokens if token.startswith("--"))
    if own := next((flag for flag in flags if flag in OWN), None):
        raise InvalidRequestError(f"{own} is a flag of pd-serve itself and cannot stand among vLLM's flags")
