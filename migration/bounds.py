"""The bounds of all waits of the protocol, in seconds unless named otherwise."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MigrationBounds:
    """Limits of one instance's migrations. No request waits longer than their sum.

    Attributes:
        reply_s: Source: for the destination's first answer.
        copy_s: Source: for one stage to be copied.
        keep_alive_s: Source: how often a long prefill renews the destination's lease.
        acknowledge_s: Source: for the commit, before asking; then between questions or withdrawals.
        questions: Source: how often to ask before taking the request back. Also how often to withdraw before
            the blocks that were offered are given back. Together longer than `tail_s`.
        lease_s: Destination: for the next message from the source, before the reservation is dropped.
        tail_s: Destination: for the last copy.
        log_s: Destination: how long a commit is remembered to answer questions.
        max_outgoing, max_incoming: Migrations at a time per instance.
        stage_bytes_per_s: Rate of copies into one instance while their requests go on; None for no bound.
        prefix_reply_s: Reader of a prefix: for each answer of the holder.
        prefix_read_s: Reader of a prefix: for the copy. Its request waits for it.
        prefix_lease_s: Holder of a prefix: how long blocks are kept for a reader, unless it answers.
        max_prefix_copies, max_prefix_leases: Prefix copies at a time per reader and holder.
        max_stages: Stages after which a request is suspended however much is left.
    """

    reply_s: float = 10.0
    copy_s: float = 30.0
    keep_alive_s: float = 2.0
    acknowledge_s: float = 2.0
    questions: int = 10
    lease_s: float = 10.0
    tail_s: float = 10.0
    log_s: float = 120.0
    prefix_reply_s: float = 1.0
    prefix_read_s: float = 5.0
    prefix_lease_s: float = 15.0
    max_outgoing: int = 64
    max_incoming: int = 64
    max_prefix_copies: int = 16
    max_prefix_leases: int = 64
    max_stages: int = 16
    stage_bytes_per_s: float | None = None
