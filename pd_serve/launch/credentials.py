"""Keys and the cluster's secret, from files and the environment rather than from where `ps` shows them."""

import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from pd_serve.config import ENVIRONMENT_PREFIX, ServeConfig
from pd_serve.errors import InvalidRequestError
from pd_serve.setting_types import parse_key_limits
from router.rate_limits import KeyLimits

ADMIN_VARIABLE = f"{ENVIRONMENT_PREFIX}ADMIN_KEY"
SECRET_VARIABLE = f"{ENVIRONMENT_PREFIX}CLUSTER_SECRET"

#: A shorter secret could be found by brute force from a recorded handshake.
LEAST_SECRET_LENGTH = 32

#: Names of keys, which metrics show.
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")

Warn = Callable[[str], None]


def with_credentials(config: ServeConfig, warn: Warn) -> ServeConfig:
    """Reads the files of keys that a configuration names, and checks all keys.

    PD_SERVE_CLUSTER_SECRET is removed from the environment, so that no other process inherits it.

    Raises:
        InvalidRequestError: A file cannot be read, a key no client could send, or a secret that is too short.
    """
    os.environ.pop(SECRET_VARIABLE, None)
    lines = [line.split(maxsplit=1) for line in _keys_of(config.api_key_file, "--api-key-file", warn)]
    keys = [*config.api_key, *(key for key, *_ in lines)]
    own = {key: _own(key, text, config.api_key_file) for key, *texts in lines for text in texts}
    admin_keys = _keys_of(config.admin_key_file, "--admin-key-file", warn)
    if len(admin_keys) > 1:
        raise InvalidRequestError(
            f"--admin-key-file: {config.admin_key_file} holds {len(admin_keys)} keys instead of one"
        )
    admin_key = admin_keys[0] if admin_keys else config.admin_key
    secret = config.cluster_secret
    if config.cluster_secret_file is not None:
        secret = _read(config.cluster_secret_file, "--cluster-secret-file", warn).encode()
    return config.model_copy(
        update={
            "api_key": tuple(map(checked_key, keys)),
            "limits_by_key": {key: limits for key, (_, limits) in own.items() if limits is not None},
            "names_by_key": {key: name for key, (name, _) in own.items() if name},
            "admin_key": None if admin_key is None else checked_key(admin_key),
            "cluster_secret": None if secret is None else _checked_secret(secret.strip()),
        }
    )


def checked_key(key: str) -> str:
    """A key that fits into a header. Raises: InvalidRequestError: it does not; the message omits the key."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidRequestError("a key must consist of printable ASCII characters without spaces")
    return key


def _own(key: str, text: str, path: Path | None) -> tuple[str, KeyLimits | None]:
    """The name of a key, "" for none, and its limits. Raises: InvalidRequestError: without the key."""
    parts = [part.strip() for part in text.split(",")]
    names = [part.removeprefix("name=") for part in parts if part.startswith("name=")]
    limits = ",".join(part for part in parts if not part.startswith("name="))
    try:
        if len(names) > 1 or any(not NAME.fullmatch(name) or key in name for name in names):
            raise ValueError
        return next(iter(names), ""), parse_key_limits(limits) if limits else None
    except ValueError:
        raise InvalidRequestError(
            f"--api-key-file: {path}: behind a key there may be a name and limits, such as"
            " name=alice,rpm=60,tpm=100000"
        ) from None


def _checked_secret(secret: bytes) -> bytes:
    if len(secret) < LEAST_SECRET_LENGTH:
        raise InvalidRequestError(
            f"the cluster's secret is too short: {LEAST_SECRET_LENGTH} characters at least,"
            " such as `openssl rand -hex 32` gives"
        )
    return secret


def _keys_of(path: Path | None, flag: str, warn: Warn) -> Sequence[str]:
    """The keys of a file, one a line; "#" begins a comment."""
    if path is None:
        return ()
    lines = (line.partition("#")[0].strip() for line in _read(path, flag, warn).splitlines())
    keys = [line for line in lines if line]
    if not keys:
        raise InvalidRequestError(f"{flag}: there is no key in {path}")
    return keys


def _read(path: Path, flag: str, warn: Warn) -> str:
    try:
        if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            warn(f"{flag}: other users can read {path}; chmod 600 it")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InvalidRequestError(f"{flag}: {path} cannot be read: {why}") from None
