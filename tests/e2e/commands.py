"""Commands that tests run beside a server, as processes of their own."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from tests.environment import START_ENVIRONMENT

ROOT = Path(__file__).parents[2]


async def run_command(
    *command: str, bound_s: float = 150.0, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """(exit code, output) of a command, which is ended after `bound_s`. Raises: TimeoutError."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=ROOT,
        env={**START_ENVIRONMENT, **(environment or {})},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(bound_s):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    return await process.wait(), output.decode()
