"""Ends a command on a signal, with the processes that it has started."""

import asyncio
import signal

#: They end a service. SIGHUP comes from a terminal that is closed.
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_on(*signals: signal.Signals) -> None:
    """From now on the first of these signals cancels the current task, which then ends what it has started.

    Later ones have no effect: they would interrupt that end. SIGHUP stays ignored if it is, as under nohup.
    """
    this = asyncio.current_task()
    assert this is not None
    ends = False

    def end() -> None:
        nonlocal ends
        if not ends:
            ends = True
            this.cancel()

    for number in signals:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, end)
