"""What the signals that end a service do, however often they come."""

import asyncio
import signal

import pytest

from pd_serve.launch.signals import END_SIGNALS, end_on


@pytest.mark.parametrize("first", END_SIGNALS)
async def test_the_first_signal_ends_the_task_and_later_ones_do_not_interrupt_its_end(
    first: signal.Signals,
) -> None:
    steps: list[str] = []

    async def serve() -> None:
        end_on(*END_SIGNALS)
        signal.raise_signal(first)
        try:
            await asyncio.Event().wait()
        finally:
            for number in END_SIGNALS:
                signal.raise_signal(number)
            await asyncio.sleep(0.01)
            steps.append("ended")

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(serve())
    assert steps == ["ended"]


async def test_a_closed_terminal_does_not_end_what_nohup_has_started() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        end_on(*END_SIGNALS)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
