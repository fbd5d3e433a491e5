"""A migration that its source has given up, until the destination has answered.

The request is decided already: it runs on at the source, or has ended. Only the blocks that the destination
was offered are left: they stay pinned, because it may still read them.
"""

from collections.abc import Callable

from migration.errors import Refusal, RefusalCode
from migration.local_instance import LocalInstance
from migration.messages import Dropped, InstanceId, MigrationId, ToSource, Withdraw
from migration.tasks import Timer

_REFUSAL = Refusal(RefusalCode.CANCELLED, "the source has given this migration up")


class Withdrawal:
    """Repeats a withdrawal until it is answered, the destination is gone, or its bound has passed.

    Args:
        on_end: Called once, when the blocks have been given back.
    """

    def __init__(
        self,
        migration_id: MigrationId,
        destination: InstanceId,
        instance: LocalInstance,
        on_end: Callable[["Withdrawal"], None],
    ) -> None:
        self.migration_id = migration_id
        self.destination = destination
        self._instance = instance
        self._on_end = on_end
        self._left = instance.bounds.questions
        self._timer = Timer(self._repeat)
        self._timer.set(instance.bounds.acknowledge_s)  # the first one has been sent

    def on_message(self, message: ToSource) -> None:
        if isinstance(message, Dropped):
            self.end()
        else:
            self._send()

    def end(self) -> None:
        """The destination reads no more."""
        self.close()
        self._instance.tasks.start(self._instance.engine.unpin(self.migration_id))
        self._on_end(self)

    def close(self) -> None:
        """Disarms the timer: the instance stops."""
        self._timer.set(None)

    def _repeat(self) -> None:
        if not self._left:
            return self.end()
        self._left -= 1
        self._timer.set(self._instance.bounds.acknowledge_s)
        self._send()

    def _send(self) -> None:
        self._instance.send(self.destination, Withdraw(self.migration_id, _REFUSAL))
