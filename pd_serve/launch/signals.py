"""Ends a command on SIGTERM, with the processes that it has started."""

import asyncio
import signal


def end_on_sigterm() -> None:
    """From now on SIGTERM cancels the current task, which then ends what it has started."""
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
