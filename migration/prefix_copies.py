"""Both sides of all prefix copies of one instance."""

from migration.local_instance import LocalInstance
from migration.messages import InstanceId, MigrationId
from migration.prefix_holder import PrefixHolder
from migration.prefix_messages import AnyPrefixMessage, ToPrefixHolder
from migration.prefix_reader import PrefixReader


class PrefixCopies:
    """Routes messages to the side that they are for. Belongs to one event loop."""

    def __init__(self, instance: LocalInstance) -> None:
        self.reader = PrefixReader(instance)
        self.holder = PrefixHolder(instance)

    def on_message(self, peer: InstanceId, message: AnyPrefixMessage) -> None:
        if isinstance(message, ToPrefixHolder):
            self.holder.on_message(peer, message)
        else:
            self.reader.on_message(peer, message)

    def peer_lost(self, peer: InstanceId) -> None:
        """A peer is known to be dead."""
        self.reader.peer_lost(peer)
        self.holder.peer_lost(peer)

    def close(self) -> None:
        """The instance stops. Its tasks are cancelled by the coordinator."""
        self.holder.close()

    @property
    def under_way(self) -> set[MigrationId]:
        """Copies to and from here."""
        return self.reader.under_way | self.holder.under_way

    def check_integrity(self) -> list[str]:
        """What is held for copies; nothing at rest."""
        return self.reader.check_integrity() + self.holder.check_integrity()
