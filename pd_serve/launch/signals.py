"""What SIGTERM does to a command that has started processes."""

import asyncio
import signal


def end_on_sigterm() -> None:
    """SIGTERM cancels the task that calls this, so that what it has started ends with it."""
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
