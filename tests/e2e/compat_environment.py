"""The environment that `make compat` makes, and what runs in it."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.environment import START_ENVIRONMENT

SCRIPTS = Path(__file__).parent / "other_clients"
COMPAT = Path(__file__).parents[2] / ".venv-compat"

needs_environment = pytest.mark.skipif(
    not (COMPAT / "bin" / "st").exists(), reason="no .venv-compat: `make compat` makes it"
)


async def output_of(*command: str | Path, codes: Sequence[int] = (0,), **environment: str) -> str:
    """What a command prints."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=pipe, stderr=pipe, env=START_ENVIRONMENT | environment
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode in codes, (out + err).decode()[-3000:]
    return out.decode()
