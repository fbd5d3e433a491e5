"""Checks of the flags of vLLM's API server, before any instance is started."""

import importlib
import ssl
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pd_serve.errors import InvalidRequestError
from pd_serve.launch.vllm_parser import as_invalid_request

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_server(server: Namespace) -> None:
    """The checks that vLLM's server makes before it loads anything, and some that it makes when it serves.

    Raises:
        InvalidRequestError: With one line that says what to change.

    Source: launcher.py, setup_server.
    """
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import validate_api_server_args

    _check_adapters(server)
    check_tls(server)
    check_middleware(server.middleware)
    if not isinstance(server.default_chat_template_kwargs or {}, dict):
        raise InvalidRequestError("--default-chat-template-kwargs: must be a JSON object")
    for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
        if not isinstance(getattr(server, name), list):
            raise InvalidRequestError(f'{_flag(name)}: must be a JSON list, such as ["*"]')
    with as_invalid_request():
        _import_plugin("--tool-parser-plugin", server.tool_parser_plugin)
        _import_plugin("--reasoning-parser-plugin", server.reasoning_parser_plugin)
        validate_parsed_serve_args(server)
        validate_api_server_args(server)


def check_loading(config: "VllmConfig") -> None:
    """Loads what API servers load once the instances have started, which may take minutes.

    Raises:
        InvalidRequestError: Something cannot be loaded; with one line that says what to change.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    with _named("--generation-config"):
        config.model_config.get_diff_sampling_param()
    with _named("--tokenizer, --tokenizer-mode"):
        cached_tokenizer_from_config(config.model_config)


def _check_adapters(server: Namespace) -> None:
    """Checks the LoRA flags early: API servers would refuse them only once the instances have started."""
    names = list(server.served_model_name or [])
    for module in server.lora_modules or []:
        if not server.enable_lora:
            raise InvalidRequestError("--lora-modules: LoRA adapters need --enable-lora")
        if module.name in names:
            raise InvalidRequestError(f"--lora-modules: the name {module.name} is given twice")
        names.append(module.name)


def _import_plugin(flag: str, plugin: str | None) -> None:
    """Imports a plugin, a module or a file, as vLLM does; but vLLM goes on without one that fails."""
    from vllm.utils.import_utils import import_plugin

    if plugin and plugin.endswith(".py") and not Path(plugin).is_file():
        raise InvalidRequestError(f"{flag}: no such file: {plugin}")
    if plugin and import_plugin(plugin) is None:
        raise InvalidRequestError(f"{flag}: {plugin} cannot be imported; the error is above")


def check_tls(server: Namespace) -> None:
    """Loads what the server is going to load. Raises: InvalidRequestError: it cannot serve with that."""
    files = {name: getattr(server, name) for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")}
    for name, path in files.items():
        if path and not Path(path).is_file():
            raise InvalidRequestError(f"{_flag(name)}: no such file: {path}")
    if not server.ssl_certfile:
        if alone := next((name for name in (*files, "ssl_ciphers") if getattr(server, name)), None):
            raise InvalidRequestError(f"{_flag(alone)}: needs --ssl-certfile")
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with _refused("--ssl-certfile, --ssl-keyfile", "must be a certificate and its private key in PEM"):
        context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile, _no_password)
    with _refused("--ssl-cert-reqs", "must be 0, 1 or 2"):
        context.verify_mode = ssl.VerifyMode(server.ssl_cert_reqs)
    if server.ssl_ca_certs:
        with _refused("--ssl-ca-certs", "must be certificates in PEM"):
            context.load_verify_locations(server.ssl_ca_certs)
    if server.ssl_ciphers:
        with _refused("--ssl-ciphers", "must be names that OpenSSL knows"):
            context.set_ciphers(server.ssl_ciphers)


def check_middleware(names: Iterable[str]) -> None:
    """Imports middlewares as vLLM does. Raises: InvalidRequestError: one cannot be imported."""
    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            getattr(importlib.import_module(module), attribute)
        except Exception as error:  # a module of the user may raise anything
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise InvalidRequestError(f"--middleware {name}: cannot be imported: {why}") from error


def _no_password() -> NoReturn:
    raise ValueError("the key has a pass phrase, which API servers cannot ask for")


@contextmanager
def _named(flags: str) -> Iterator[None]:
    """Raises: InvalidRequestError: instead of what vLLM raises, with the flags that it is about."""
    try:
        with as_invalid_request():
            yield
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{flags}: {error}") from error


@contextmanager
def _refused(flag: str, expected: str) -> Iterator[None]:
    """Raises: InvalidRequestError: instead of what OpenSSL says."""
    try:
        yield
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or str(error)
        raise InvalidRequestError(f"{flag}: {expected} ({why})") from error


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
