"""Commands with MODEL, our flags and vLLM's flags in any order; our flags are made from the settings."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from pd_serve.config import GROUPS, ServeConfig
from pd_serve.errors import InvalidRequestError
from pd_serve.launch.command_line import cut

#: Our flags that take several values at a time, as vLLM's flag of the same name does.
SEVERAL_VALUES = frozenset(("--served-model-name",))

#: Key of vLLM's flags in `typer.Context.meta`.
ENGINE_ARGS = "engine_args"

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", show_default=False, help="Directory, hub name or demo model."),
]


class EngineCommand(TyperCommand):
    """Takes vLLM's flags and MODEL anywhere, refuses unknown flags at once, and groups its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # shell completion
            return super().parse_args(ctx, args)
        own: dict[str, int | str] = dict.fromkeys(ctx.help_option_names, 0)
        for param in self.params:
            if param.param_type_name == "option":
                nargs = 0 if getattr(param, "is_flag", False) else 1
                own |= dict.fromkeys((*param.opts, *param.secondary_opts), nargs)
        own |= dict.fromkeys(SEVERAL_VALUES & own.keys(), "+")
        line = cut(args, own)
        if len(line.positionals) > 1:
            first, second = line.positionals[:2]
            raise InvalidRequestError(f"unexpected argument {second!r}; MODEL is {first!r} already")
        ctx.meta[ENGINE_ARGS] = line.engine_args
        return super().parse_args(ctx, [*line.own, *line.positionals])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[MODEL]", "[OPTIONS]", "[VLLM OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                groups.setdefault(
                    getattr(param, "rich_help_panel", None) or f"{param.param_type_name.title()}s", []
                ).append(record)
        for title in sorted(groups, key=("Arguments", *GROUPS, *groups).index):
            with formatter.section(title):
                formatter.write_dl(groups[title])


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that takes `**settings` a flag for each setting of the service."""
    parameters = [
        parameter
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    for name, setting in ServeConfig.model_fields.items():
        if isinstance(setting.json_schema_extra, dict):
            value: Any = _type(setting.annotation)
            kind: Any = Annotated[value | None, _option(name, setting)]
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=None)
            )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _option(name: str, setting: FieldInfo) -> Any:
    extra: Any = setting.json_schema_extra
    default = setting.default
    shown = extra["shown"] or (None if default in (None, (), False) else "on" if default is True else default)
    help = f"{setting.description}" + (f" [default: {shown}]" if shown is not None else "")
    flag = "--" + name.replace("_", "-")
    declaration = f"{flag}/--no-{flag[2:]}" if setting.annotation is bool else flag
    return typer.Option(
        declaration, help=help, metavar=extra["metavar"], rich_help_panel=extra["group"], show_default=False
    )


def _type(annotation: Any) -> Any:
    """The type that the command line reads: texts, except for numbers, paths, choices and switches."""
    options = get_args(annotation)
    inner = next(one for one in options if one is not NoneType) if NoneType in options else annotation
    if get_origin(inner) is tuple and get_args(inner)[1:] == (...,):
        return list[str]
    return inner if inner in (int, float, bool, Path) or get_origin(inner) is Literal else str


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the command line has."""
    return {name: value for name, value in settings.items() if value not in (None, [])}
