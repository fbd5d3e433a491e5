"""What an engine holds for KV that is on its way to it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks held for KV that is on its way here: of a request, or of a prefix.

    Attributes:
        tables: For each cache group the local block ids by block index of the request; `NO_BLOCK` where it
            needs none. Empty for groups with state.
        states: The block of each group with state, as in `KvPart`. None of a prefix.
        tokens_present: Number of its first tokens whose KV is here already (prefix cache hits).
    """

    tables: list[list[int]]
    states: list[int]
    tokens_present: int
