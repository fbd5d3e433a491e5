"""What an instance tells API servers about the blocks in its prefix cache."""

import asyncio
from dataclasses import dataclass, field

from migration.engine_interface import Engine
from pd_serve.comm.cached_blocks import CachedBlocks, packed
from pd_serve.comm.membership import MembershipView
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.timing import CACHE_REPORT_INTERVAL_S

#: Keys in one message that follow from changes, and as many that a reader lacks: 64 KiB together.
MAX_KEYS = 4096


@dataclass
class _Reader:
    """An API server that follows the reports.

    Attributes:
        begins: Its next report is its first one.
        rest: Keys that were here when it asked; those from `sent` on it has not been told.
    """

    begins: bool = True
    rest: list[int] = field(default_factory=list)
    sent: int = 0

    @property
    def is_behind(self) -> bool:
        return self.begins or self.sent < len(self.rest)


class CachedBlockReporter:
    """Reports the keys that the prefix cache gains and loses to the API servers that have asked.

    All of them get the same reports, at most one each `CACHE_REPORT_INTERVAL_S`. One that asks, or asks again
    as it has missed a report, also gets all keys from before, by and by.

    Attributes:
        number: Of the last report.
        num_asked: How often an API server has asked.
    """

    def __init__(self, wire: MessageWire, members: MembershipView) -> None:
        self.number = 0
        self.num_asked = 0
        self._wire = wire
        self._members = members
        self._keys: dict[int, None] = {}  # as reported
        self._readers: dict[str, _Reader] = {}
        self._due = asyncio.Event()
        self._address: str
        self._engine: Engine

    @property
    def num_keys(self) -> int:
        """Keys that have been reported and are still here."""
        return len(self._keys)

    def start(self, engine: Engine, address: str) -> None:
        self._engine, self._address = engine, address

    def on_asked(self, api_server: str) -> None:
        """An API server wants to know all keys, and every change from now on."""
        if api_server in self._members.api_servers:
            self.num_asked += 1
            self._readers[api_server] = _Reader(rest=list(self._keys))
            self._due.set()

    def report_soon(self) -> None:
        if self._readers:
            self._due.set()

    def reader_left(self, api_server: str) -> None:
        if self._readers.pop(api_server, None) is not None and not self._readers:
            self.number += 1  # no reports follow: if it comes back, it notices that it misses some

    async def run(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            await self._report()
            await asyncio.sleep(CACHE_REPORT_INTERVAL_S)

    async def _report(self) -> None:
        changes = await self._engine.cached_keys.take(MAX_KEYS)
        if changes is None and not any(reader.is_behind for reader in self._readers.values()):
            return
        gained, lost = (changes.gained, changes.lost) if changes is not None else ([], [])
        if changes is not None and changes.anew:
            self._keys.clear()
            for name in self._readers:
                self._readers[name] = _Reader()
        self._keys.update(dict.fromkeys(gained))
        for key in lost:
            self._keys.pop(key, None)
        self.number += 1
        report = CachedBlocks(self._address, self.number, packed(gained), packed(lost))
        for name, reader in self._readers.items():
            self._wire.send(name, self._for(reader, report) if reader.is_behind else report)
        self._due.set()  # until there is nothing more to report

    def _for(self, reader: _Reader, report: CachedBlocks) -> CachedBlocks:
        """The report, with further keys that the reader lacks."""
        part = reader.rest[reader.sent : reader.sent + MAX_KEYS]
        more = [key for key in part if key in self._keys]
        full = CachedBlocks(
            report.address, report.number, report.gained + packed(more), report.lost, reader.begins
        )
        reader.begins, reader.sent = False, reader.sent + len(part)
        if not reader.is_behind:
            reader.rest, reader.sent = [], 0
        return full
