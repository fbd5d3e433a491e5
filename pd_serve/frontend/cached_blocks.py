"""Follows what the instances report of their prefix caches, for the index of an API server."""

import asyncio
import math
from dataclasses import dataclass

from migration.cached_keys import KeyFormat
from pd_serve.comm.cached_blocks import CachedBlocks, FollowCachedBlocks, unpacked
from pd_serve.comm.membership import Membership, MembershipView
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.timing import CACHE_ASK_INTERVAL_S
from router.prefix_index import PrefixIndex


@dataclass
class _Followed:
    """The reports of an instance.

    Attributes:
        number: Of the last one that has arrived.
        is_whole: No report was missed since the instance has begun anew.
        asked_at: On the event loop's clock.
    """

    number: int = 0
    is_whole: bool = False
    asked_at: float = -math.inf


class CachedBlockFollower:
    """Keeps a `PrefixIndex` up to date, if a policy uses it.

    An instance is asked for all its keys at first, and whenever a report of it has not arrived. Reports of an
    earlier instance of the same name, and those that come late or twice, are ignored.
    """

    def __init__(self, wire: MessageWire, members: MembershipView, index: PrefixIndex) -> None:
        self._wire = wire
        self._members = members
        self._index = index
        self._loop = asyncio.get_running_loop()
        self._followed: dict[str, _Followed] = {}
        self._format: KeyFormat | None = None
        self._seen: Membership | None = None

    @property
    def format(self) -> KeyFormat | None:
        """Format of the keys: that of the first instance that has keys. None if they are not needed."""
        if not self._index.is_used:
            return None
        if self._members.latest is not self._seen:
            self._seen = self._members.latest
            formats = [info.engine.key_format for info in self._members.instances.values()]
            if self._format not in formats:
                self._format = next((found for found in formats if found is not None), None)
                self._index.key_tokens = self._format.key_tokens if self._format is not None else 0
        return self._format

    def is_whole(self, instance_id: str) -> bool:
        """Whether the index has all that an instance has reported."""
        return instance_id in self._followed and self._followed[instance_id].is_whole

    def on_load(self, instance_id: str, number: int) -> None:
        """A member has sent a load report; `number` is that of its last report of cached blocks."""
        if not self._has_keys(instance_id):
            return self.remove(instance_id)
        followed = self._followed.setdefault(instance_id, _Followed())
        followed.is_whole = followed.is_whole and number <= followed.number
        if not followed.is_whole and self._loop.time() >= followed.asked_at + CACHE_ASK_INTERVAL_S:
            followed.asked_at = self._loop.time()
            self._wire.send(instance_id, FollowCachedBlocks())

    def on_report(self, instance_id: str, report: CachedBlocks) -> None:
        followed = self._followed.get(instance_id)
        if followed is None or report.address != self._members.instances[instance_id].address:
            return
        if report.number <= followed.number:
            return
        follows = report.number == followed.number + 1
        followed.number = report.number
        is_whole, followed.is_whole = report.anew or (followed.is_whole and follows), False
        if not is_whole:
            return
        gained, lost = unpacked(report.gained), unpacked(report.lost)
        followed.is_whole = True
        if report.anew:
            self._index.clear(instance_id)
        self._index.discard(instance_id, lost)
        self._index.add(instance_id, gained, self._members.instances[instance_id].engine.num_blocks)

    def remove(self, instance_id: str) -> None:
        """An instance is gone, or has no keys of this format."""
        if self._followed.pop(instance_id, None) is not None:
            self._index.remove(instance_id)

    def _has_keys(self, instance_id: str) -> bool:
        wanted = self.format
        return wanted is not None and self._members.instances[instance_id].engine.key_format == wanted
