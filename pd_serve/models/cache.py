"""Directories that are built once and then only read, shared by all processes of a user."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from pd_serve.errors import InvalidRequestError


def cache_root() -> Path:
    """`$PD_SERVE_CACHE`, else `~/.cache/pd-serve`. It need not exist."""
    configured = os.environ.get("PD_SERVE_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "pd-serve"


def cached_directory(key: str, build: Callable[[Path], None]) -> Path:
    """The directory `key` below the cache root, built on first use.

    `build` fills an empty directory, which takes the final name only when `build` has returned: a directory
    that exists is complete. Of several processes one builds and the others wait. If `build` raises, nothing
    is left behind and the error goes on to the caller.

    Raises:
        InvalidRequestError: The cache cannot be written.
    """
    target = cache_root() / "models" / key
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        opened = target.with_name(f".{key}.lock").open("w")
    except OSError as error:
        raise InvalidRequestError(
            f"cannot write to {target.parent} ({error.strerror}): set PD_SERVE_CACHE to another folder"
        ) from error
    with opened as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel drops it if the process dies
        if target.is_dir():
            return target
        unfinished = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=target.parent))
        try:
            build(unfinished)
            unfinished.chmod(0o755)
            os.replace(unfinished, target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return target
