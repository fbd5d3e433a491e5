"""vLLM's own parser of its server and engine flags, made to raise one line instead of printing and exiting.

Making it imports most of vLLM: seconds of CPU, once per process.
"""

import contextlib
import gc
import re
from argparse import Action, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, NoReturn

from pydantic import ValidationError

from pd_serve.errors import InvalidRequestError


@contextlib.contextmanager
def as_invalid_request() -> Iterator[None]:
    """Turn the errors that vLLM raises on a bad value, which have many types, into one line."""
    from vllm.exceptions import VLLMError

    try:
        yield
    except ValidationError as error:
        raise InvalidRequestError("; ".join(map(_message, error.errors()))) from error
    except (VLLMError, ValueError, TypeError, KeyError, OSError, AssertionError, ImportError) as error:
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise InvalidRequestError(_one_line(str(said))) from error
    except RuntimeError as error:  # such as ("File does not exist: %s", path)
        said = " ".join(str(part).removesuffix("%s") for part in error.args)
        raise InvalidRequestError(_one_line(said)) from error


def _message(error: Mapping[str, Any]) -> str:
    """The message of one of pydantic's errors, with its flag if there is one."""
    said = _one_line(error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, "))
    flag = "--" + ".".join(str(part) for part in error["loc"]).replace("_", "-")
    return f"{flag}: {said}" if flag in options() else said


def _one_line(text: str) -> str:
    return " ".join(re.sub(r"For further information visit \S+", "", text).removeprefix("Error: ").split())


@cache
def parser() -> Any:
    """vLLM's parser of server and engine flags; it raises instead of printing and exiting."""
    was_enabled = gc.isenabled()
    gc.disable()  # thousands of modules are imported and leave no garbage: saves about 1 s in 7
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    finally:
        if was_enabled:
            gc.enable()

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise InvalidRequestError(_one_line(message.removeprefix("argument ")))

    return make_arg_parser(Parser(add_help=False, allow_abbrev=False))


@cache
def options() -> dict[str, Action]:
    """Every spelling of every flag that vLLM knows."""
    return {spelling: action for action in parser()._actions for spelling in action.option_strings}


@cache
def engine_settings() -> frozenset[str]:
    """Settings of an engine that have a flag; the others are the API server's."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    have_flag = {action.dest for action in parser()._actions}
    return frozenset(item.name for item in fields(AsyncEngineArgs)) & have_flag


@cache
def defaults_of_vllm() -> Namespace:
    namespace: Namespace = parser().parse_args([])
    return namespace
