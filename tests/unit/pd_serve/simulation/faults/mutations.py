"""Bugs that are put into the product on purpose. The campaign has to find each of them.

`python -m tests.unit.pd_serve.simulation.faults.mutations` looks for the first seed that finds each one.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from migration.prefix_reader import PrefixCopy, PrefixReader
from migration.token_span import TokenSpan
from migration.transport.local import LocalTransport
from pd_serve.comm.leases import OrphanTimer
from pd_serve.comm.membership import MembershipChange, MembershipView
from pd_serve.frontend.placement import RequestPlacement
from pd_serve.frontend.reconciler import Reconciler
from pd_serve.frontend.token_ledger import TokenLedger
from pd_serve.instance.handoffs import Handoffs
from pd_serve.manager.manager import Manager
from pd_serve.manager.register import InstanceRegister
from pd_serve.manager.stopper import Stopper
from pd_serve.simulated_engine.migrations import SequenceMigrations
from pd_serve.simulation.faults.draw import draw
from pd_serve.simulation.faults.run import run

#: Seeds in which each bug has to be found.
MAX_SEEDS = 1000


@dataclass(frozen=True)
class Mutation:
    """A method that is replaced.

    Attributes:
        make: Makes the replacement of the method.
        tier, seed: The first seed that finds the bug.
        finding: A part of what it finds.
    """

    name: str
    owner: type
    method: str
    make: Callable[[Any], Any]
    tier: int
    seed: int
    finding: str

    @contextmanager
    def applied(self) -> Iterator[None]:
        original = getattr(self.owner, self.method)
        setattr(self.owner, self.method, self.make(original))
        try:
            yield
        finally:
            setattr(self.owner, self.method, original)


def _nothing(original: Any) -> Any:
    return lambda *arguments, **named: None


def _forgotten_blocks(drop: Any) -> Any:
    def mutated(self: SequenceMigrations, migration_id: str) -> Any:
        return None if self.arriving.pop(migration_id, None) is not None else drop(self, migration_id)

    return mutated


def _accepted_twice(take: Any) -> Any:
    return lambda self, index, output, now: take(self, len(self.token_ids), output, now)


def _last_block_not_read(read: Any) -> Any:
    async def mutated(self: LocalTransport, peer: str, endpoint: bytes, theirs: Any, ours: Any) -> int:
        copied: int = await read(self, peer, endpoint, theirs[:-1], ours[:-1])
        return max(1, copied)

    return mutated


def _stays_connected(connect: Any) -> Any:
    def mutated(self: MembershipView, change: MembershipChange) -> None:
        connect(self, replace(change, left=[], api_servers_left={}))

    return mutated


def _drained_at_once(is_drained: Any) -> Any:
    async def mutated(self: Stopper, instance_id: str, deadline: float) -> bool:
        return True

    return mutated


def _no_lease(silent: Any) -> Any:
    return lambda self: []


def _any_epoch(accept: Any) -> Any:
    def mutated(self: TokenLedger, source: str, span: TokenSpan, *rest: Any) -> Any:
        if span[0] < self.epoch:  # and the CRC is not compared
            return accept(self, self.owner, (self.epoch, span[1], self.crc), *rest)
        return accept(self, source, span, *rest)

    return mutated


def _sizes_forgotten(take_over: Any) -> Any:
    async def mutated(self: Manager) -> bool:
        find = self._launcher.find

        async def without_sizes() -> Any:
            infos, notes = await find()
            return infos, notes and replace(notes, wanted=dict(self._config.instances))

        self._launcher.find = without_sizes  # type: ignore[method-assign]
        return bool(await take_over(self))

    return mutated


def _prefix_not_read(read: Any) -> Any:
    async def mutated(self: PrefixReader, copy: PrefixCopy, *rest: Any) -> int:
        return 8

    return mutated


MUTATIONS = [
    Mutation(
        "a peer that left stays connected", MembershipView, "_connect", _stays_connected, 1, 0, "connected"
    ),
    Mutation("a pin never ends", SequenceMigrations, "unpin", _nothing, 1, 0, "has not ended"),
    Mutation(
        "the blocks of an arrival stay", SequenceMigrations, "drop", _forgotten_blocks, 1, 6, "KV blocks"
    ),
    Mutation("a token is accepted twice", TokenLedger, "_take", _accepted_twice, 2, 3, "token"),
    Mutation("a drain forgets requests", Stopper, "_is_drained", _drained_at_once, 2, 2, "with the requests"),
    Mutation("the last block is not read", LocalTransport, "read", _last_block_not_read, 1, 0, "token"),
    Mutation(
        "a request on its way counts for ever", RequestPlacement, "settle", _nothing, 1, 0, "on their way"
    ),
    Mutation("a lease never ends", InstanceRegister, "silent", _no_lease, 1, 5, "has the loads of"),
    Mutation("outdated tokens are taken", TokenLedger, "accept", _any_epoch, 1, 64, "has failed"),
    Mutation("lost messages are not noticed", Reconciler, "check", _nothing, 2, 12, "has not ended"),
    Mutation("a prefix is not read", PrefixReader, "_read", _prefix_not_read, 2, 2, "token"),
    Mutation("a left instance never ends", OrphanTimer, "on_heartbeat", _nothing, 4, 1, "has the instances"),
    Mutation("a hand-off is not forgotten", Handoffs, "forget", _nothing, 4, 5, "wait for a hand-off"),
    Mutation("wanted sizes are forgotten", Manager, "take_over", _sizes_forgotten, 2, 24, "are wanted"),
]


def first_seed(mutation: Mutation) -> tuple[int, list[str]] | None:
    """The first seed that finds a mutation, and its findings."""
    with mutation.applied():
        for seed in range(MAX_SEEDS):
            if findings := run(draw(seed, mutation.tier)).findings:
                return seed, findings
    return None


def main() -> None:
    """Arguments: parts of the names of the bugs to look for; by default, all."""
    chosen = [m for m in MUTATIONS if not sys.argv[1:] or any(part in m.name for part in sys.argv[1:])]
    for mutation in chosen:
        found = first_seed(mutation)
        print(f"{mutation.name}: tier {mutation.tier},", "not found" if found is None else found, flush=True)


if __name__ == "__main__":
    sys.exit(main())
