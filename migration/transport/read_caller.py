"""The caller's side of reads that something else carries out: a thread, or the process of a worker."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from migration.errors import PeerLostError
from migration.transport.quarantine import Quarantine

#: How often a read looks whether the reader is overdue, and by how much it may be.
LOOK_S, OVERDUE_S = 1.0, 10.0

#: How long a cancelled read's caller waits for what is under way.
CANCEL_GRACE_S = 0.5


class ReadCaller:
    """Waits for reads within a bound. Belongs to one event loop.

    Args:
        reader: What carries the reads out, for errors.
        timeout_s: The reader's own bound of one read.
        on_failure: Called when the reader does not answer. Nothing is known of the blocks that it was writing
            to. It has to end the process.

    Attributes:
        quarantine: See `KvTransport`.
    """

    def __init__(self, reader: str, timeout_s: float, on_failure: Callable[[BaseException], None]) -> None:
        self.quarantine = Quarantine()
        self._reader = reader
        self._timeout_s = timeout_s
        self._on_failure = on_failure

    async def wait_for(
        self,
        done: "asyncio.Future[None]",
        quiet: "asyncio.Future[None]",
        blocks: Sequence[int],
        cancel: Callable[[], None],
    ) -> None:
        """Returns, or raises, what a read does.

        Args:
            done: The reader sets it, or its error.
            quiet: The reader sets it when nothing writes to the blocks any more; perhaps later than `done`.
            blocks: The local blocks; in quarantine from now on if `quiet` is not done when this returns.
            cancel: Tells the reader that this call was cancelled.

        Raises:
            PeerLostError: The reader does not answer. Or what `done` has.
        """
        try:
            await self._watch(done, self._timeout_s)
            done.result()
        except asyncio.CancelledError:
            cancel()
            waiting = asyncio.ensure_future(self._watch(done, CANCEL_GRACE_S))
            while not waiting.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([waiting])
            done.exception()  # so that asyncio does not report it
            raise
        finally:
            if not quiet.done():
                self.quarantine.add(blocks, quiet)

    async def _watch(self, done: "asyncio.Future[None]", timeout_s: float) -> None:
        """Waits for a read's end, counting its time in looks: a suspension of the process does not count."""
        looks = 0
        while not done.done():
            if looks * LOOK_S > timeout_s + OVERDUE_S:
                error = PeerLostError(f"{self._reader} does not answer")
                done.set_exception(error)
                self._on_failure(error)
                break
            await asyncio.wait([done], timeout=LOOK_S)
            looks += 1
