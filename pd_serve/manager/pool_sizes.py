"""The wanted size of each pool, and the starts and stops that lead to it."""

from collections.abc import Mapping

from pd_serve.errors import InvalidRequestError, MigrationRefusedError
from pd_serve.manager.register import InstanceRegister
from pd_serve.manager.starter import Starter
from pd_serve.manager.stopper import Stopper
from router.scaling import PoolBounds


class PoolSizes:
    """Sizes of the pools: replaces dead instances and changes sizes for the operator.

    Args:
        autoscale: Bounds by role, for the pools that the scheduler scales.
        replaces: In the other pools, starts an instance in place of each one that died.

    Attributes:
        wanted: Wanted sizes, by role. `scale` and instances that an operator stops change them.
    """

    def __init__(
        self,
        register: InstanceRegister,
        starter: Starter,
        stopper: Stopper,
        wanted: Mapping[str, int],
        autoscale: Mapping[str, PoolBounds],
        *,
        replaces: bool,
    ) -> None:
        self._register = register
        self._starter = starter
        self._stopper = stopper
        self._autoscale = autoscale
        self._replaces = replaces
        self.wanted = dict(wanted)
        self._stopped: dict[str, str] = {}  # roles of instances that an operator stops, by id

    @property
    def least(self) -> dict[str, int]:
        """Sizes that the pools should have at least; that of an autoscaled pool is its lower bound."""
        return self.wanted | {role: bounds.least for role, bounds in self._autoscale.items()}

    def size(self, role: str) -> int:
        """Number of instances of a role that serve and are not leaving, or are being started."""
        staying = [
            n for n, r in self._register.roles().items() if r == role and n not in self._stopper.leaving
        ]
        return len(staying) + self._starter.num_coming(role)

    def scale(self, sizes: Mapping[str, int]) -> None:
        """Changes the sizes of pools: starts instances, or drains and stops those with the fewest requests.

        Raises:
            InvalidRequestError: No such role, or the service could not serve with these sizes.
            MigrationRefusedError: The scheduler decides the size of this pool, within other bounds.
        """
        if unknown := sorted(sizes.keys() - self.wanted.keys()):
            raise InvalidRequestError(f"no role {unknown[0]!r}; there are {', '.join(self.wanted)}")
        after = {role: self.size(role) for role in self.wanted} | dict(sizes)
        if min(after.values()) < 0:
            raise InvalidRequestError("the number of instances cannot be negative")
        if not after["prefill"] and not after["neutral"]:
            raise InvalidRequestError("no instance would take requests")
        if bool(after["prefill"]) != bool(after["decode"]):
            raise InvalidRequestError("prefill and decode instances need each other")
        for role, size in sizes.items():
            if (bounds := self._autoscale.get(role)) and not bounds.least <= size <= bounds.most:
                within = f"{bounds.least}:{bounds.most}"
                raise MigrationRefusedError(f"the scheduler scales {role} instances within {within}")
        for role, size in sizes.items():
            self._resize(role, size)

    def _resize(self, role: str, size: int) -> None:
        reason = f"{role}={size} requested by the operator"
        self.wanted[role] = size
        for _ in range(size - self.size(role)):
            self._starter.start_until_ready(role, reason)
        while self.size(role) > size and self._starter.unqueue(role):
            pass
        candidates = [
            n for n, r in self._register.roles().items() if r == role and n not in self._stopper.leaving
        ]
        candidates.sort(key=self._register.num_requests)
        for instance_id in candidates[: max(0, self.size(role) - size)]:
            self._stopper.drain(instance_id, True, reason)
            self._stopper.stop_drained(instance_id, reason)

    def start_missing(self, reason: str) -> None:
        """Starts instances until every pool has its wanted size."""
        for role, wanted in self.wanted.items():
            for _ in range(wanted - self.size(role)):
                self._starter.start_until_ready(role, reason)

    def stop_one(self, instance_id: str) -> None:
        """Stops an instance for the operator, and makes its pool smaller by one. Idempotent."""
        if instance_id not in self._stopped:
            role = self._stopped[instance_id] = self._register.role_of(instance_id)
            self.wanted[role] -= 1
            self._stopper.stop_drained(instance_id, "drained by the operator")

    def undo_stop(self, instance_id: str) -> None:
        """Undoes `stop_one`: the operator uses the instance again."""
        if (role := self._stopped.pop(instance_id, None)) is not None:
            self.wanted[role] += 1

    def replace_dead(self, instance_id: str, role: str) -> None:
        """Starts an instance in place of a dead one that was not leaving, if the scheduler does not scale."""
        was_leaving = instance_id in self._stopper.leaving
        self._stopped.pop(instance_id, None)
        if self._replaces and role not in self._autoscale and not was_leaving:
            self._starter.start_until_ready(role, f"in the place of {instance_id}, which has died")
