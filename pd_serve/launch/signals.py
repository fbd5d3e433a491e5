"""Ends a command on a signal, with the processes that it has started."""

import asyncio
import signal

#: They end a service.
END_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_on(*signals: signal.Signals) -> None:
    """From now on these signals cancel the current task, which then ends what it has started."""
    this = asyncio.current_task()
    assert this is not None
    for number in signals:
        asyncio.get_running_loop().add_signal_handler(number, this.cancel)
