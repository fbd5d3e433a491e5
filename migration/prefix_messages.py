"""The messages of a prefix copy between two llumlets. One-way; msgpack on the wire, never pickle.

An instance that is to compute a prompt, the **reader**, copies the KV blocks of the prompt's prefix from the
prefix cache of another instance, the **holder**, into its own. No request is part of it.
"""

import msgspec

from migration.errors import Refusal
from migration.messages import KvPart, MigrationId


class PrefixMessage(msgspec.Struct, frozen=True, tag=True):
    copy_id: MigrationId


class PrefixAsk(PrefixMessage, frozen=True, tag=True):
    """Reader → holder: which blocks of this prefix do you hold?

    Attributes:
        hashes: The engine's hash of each block of the prompt, from the first block on.
        max_tokens: The most tokens that are of use.
        compatibility: What has to be equal at the holder, by name.
    """

    hashes: list[bytes]
    max_tokens: int
    compatibility: dict[str, str]


class PrefixOffer(PrefixMessage, frozen=True, tag=True):
    """Holder → reader: these blocks stay as they are until you have read them, or for the time of a lease.

    Attributes:
        part: The blocks of all cache groups from the first token on; a state is a block of its group.
        kv_endpoint: See `KvTransport.endpoint`.
    """

    part: KvPart
    kv_endpoint: bytes


class PrefixRefused(PrefixMessage, frozen=True, tag=True):
    """Holder → reader: there is nothing to read, or what was read may have changed meanwhile."""

    refusal: Refusal


class PrefixRead(PrefixMessage, frozen=True, tag=True):
    """Reader → holder: I read these blocks no more. Was the lease in force until now?"""


class PrefixConfirmed(PrefixMessage, frozen=True, tag=True):
    """Holder → reader: it was. The blocks were whole when they were read."""


ToPrefixHolder = PrefixAsk | PrefixRead
ToPrefixReader = PrefixOffer | PrefixRefused | PrefixConfirmed
AnyPrefixMessage = ToPrefixHolder | ToPrefixReader
