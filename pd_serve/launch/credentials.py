"""Keys and the cluster's secret, from files and the environment rather than from where `ps` shows them."""

import os
import re
import stat
from collections.abc import Callable, Mapping
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

#: A setting behind a key that no space ends.
SETTING_IN_KEY = re.compile(r",(name|rpm|tpm)=")

#: A "#" within a key begins none.
COMMENT = re.compile(r"(^|\s)#.*")

Warn = Callable[[str], None]


def with_credentials(config: ServeConfig, warn: Warn) -> ServeConfig:
    """Reads the files of keys that a configuration names, and checks all keys.

    PD_SERVE_CLUSTER_SECRET is removed from the environment, so that no other process inherits it.

    Raises:
        InvalidRequestError: A file cannot be read, a key no client could send, or a secret that is too short.
    """
    os.environ.pop(SECRET_VARIABLE, None)
    lines = _lines_of(config.api_key_file, "--api-key-file", warn)
    _refuse_doubtful(lines, config.api_key_file)
    in_file = [line.split(maxsplit=1) for line in lines.values()]
    keys = dict.fromkeys([*config.api_key, *(key for key, *_ in in_file)])
    own = {key: _name_and_limits(key, text, config.api_key_file) for key, *texts in in_file for text in texts}
    admin_keys = list(_lines_of(config.admin_key_file, "--admin-key-file", warn).values())
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


def _refuse_doubtful(lines: Mapping[int, str], path: Path | None) -> None:
    """Refuses keys given twice, and settings that no space separates from their key.

    Raises:
        InvalidRequestError: A line has one of these. The message omits the key.
    """
    first: dict[str, int] = {}
    for number, line in lines.items():
        key = line.split(maxsplit=1)[0]
        if SETTING_IN_KEY.search(key):
            raise InvalidRequestError(
                f"--api-key-file: {path}, line {number}: a space has to stand between a key and its settings"
            )
        if first.setdefault(key, number) != number:
            raise InvalidRequestError(
                f"--api-key-file: {path}: lines {first[key]} and {number} have the same key; give it once,"
                " with all its settings"
            )


def _name_and_limits(key: str, text: str, path: Path | None) -> tuple[str, KeyLimits | None]:
    """The name of a key ("" for none) and its limits, from the text behind the key.

    Raises:
        InvalidRequestError: The text is neither. The message omits the key.
    """
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


def _lines_of(path: Path | None, flag: str, warn: Warn) -> dict[int, str]:
    """The lines of a file with keys, by number, without comments."""
    if path is None:
        return {}
    lines = enumerate(_read(path, flag, warn).splitlines(), start=1)
    keys = {number: text for number, line in lines if (text := COMMENT.sub("", line).strip())}
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
