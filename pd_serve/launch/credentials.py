"""Keys and secrets that an operator gives, by file or environment rather than where `ps` shows them."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from pd_serve.errors import InvalidRequestError

ADMIN_VARIABLE = "PD_SERVE_ADMIN_KEY"
SECRET_VARIABLE = "PD_SERVE_CLUSTER_SECRET"

#: Shorter ones could be found by trying, from a recorded handshake.
LEAST_SECRET_LENGTH = 32


def read_api_keys(given: list[str], path: Path | None, warn: Callable[[str], None]) -> tuple[str, ...]:
    """The keys of the command line, then those of a file: one a line, "#" begins a comment.

    Raises:
        InvalidRequestError: No such file, no key in it, or a key that no client could send.
    """
    keys = list(given)
    if path is not None:
        keys += _keys_of(path, "--api-key-file", warn)
    return tuple(checked_key(key) for key in keys)


def read_admin_key(given: str | None, path: Path | None, warn: Callable[[str], None]) -> str | None:
    """The key of a file, else the one given, else PD_SERVE_ADMIN_KEY; None if there is none, or it is empty.

    Raises:
        InvalidRequestError: As for API keys, or a file with several keys.
    """
    if path is not None:
        keys = _keys_of(path, "--admin-key-file", warn)
        if len(keys) > 1:
            raise InvalidRequestError(
                f"--admin-key-file: there are {len(keys)} keys in {path}, and one is used"
            )
        given = keys[0]
    key = given if given is not None else os.environ.get(ADMIN_VARIABLE) or None
    return None if key is None else checked_key(key)


def checked_key(key: str) -> str:
    """A key that fits into a header. Raises: InvalidRequestError: it does not; the key itself is not told."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidRequestError("a key has to be of printable ASCII characters without spaces")
    return key


def read_cluster_secret(path: Path | None, warn: Callable[[str], None]) -> bytes | None:
    """What `--cluster-secret-file` holds, or PD_SERVE_CLUSTER_SECRET; None if neither is given.

    The variable is taken out of the environment, so that no other process inherits it.

    Raises:
        InvalidRequestError: No such file, or a secret that is too short.
    """
    variable = os.environ.pop(SECRET_VARIABLE, None)
    text = variable if path is None else _read(path, "--cluster-secret-file", warn)
    if text is None:
        return None
    if len(secret := text.strip().encode()) < LEAST_SECRET_LENGTH:
        raise InvalidRequestError(
            f"the cluster's secret is too short: {LEAST_SECRET_LENGTH} characters at least,"
            " such as `openssl rand -hex 32` gives"
        )
    return secret


def _keys_of(path: Path, flag: str, warn: Callable[[str], None]) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in _read(path, flag, warn).splitlines())
    keys = [line for line in lines if line]
    if not keys:
        raise InvalidRequestError(f"{flag}: there is no key in {path}")
    return keys


def _read(path: Path, flag: str, warn: Callable[[str], None]) -> str:
    try:
        if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            warn(f"{flag}: others can read {path}; chmod 600 it")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InvalidRequestError(f"{flag}: {path} cannot be read: {why}") from None
