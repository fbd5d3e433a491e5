"""The wanted size of each pool, and the starts and stops that lead to it."""

from collections.abc import Callable, Mapping

from pd_serve.errors import InvalidRequestError, MigrationRefusedError
from pd_serve.manager.register import InstanceRegister
from pd_serve.manager.starter import Starter
from pd_serve.manager.stopper import Stopper
from router.scaling import PoolBounds


class PoolSizes:
    """Sizes of the pools: replaces dead instances and changes sizes for the operator.

    Args:
        autoscale: Bounds by role, for the pools that the scheduler scales. Only their lower bounds are held
            here.
        replaces: In the other pools, starts an instance in place of each one that died.
        spare: Returns an instance that does not count, because it will replace one that does; "" for none.

    Attributes:
        wanted: Wanted sizes, by role. `scale`, instances that an operator stops or uses again, and roles that
            the scheduler changes, change them.
        stopped: Instances by which an operator has made a pool smaller, with its role. Each changes the
            wanted size once, and once back when it is used again.
    """

    def __init__(
        self,
        register: InstanceRegister,
        starter: Starter,
        stopper: Stopper,
        wanted: Mapping[str, int],
        autoscale: Mapping[str, PoolBounds],
        spare: Callable[[], str],
        *,
        replaces: bool,
    ) -> None:
        self._register = register
        self._starter = starter
        self._stopper = stopper
        self._autoscale = autoscale
        self._spare = spare
        self._replaces = replaces
        self.wanted = dict(wanted)
        self.stopped: dict[str, str] = {}
        register.on_role_change = self._on_role_change

    @property
    def least(self) -> dict[str, int]:
        """Sizes that the pools should have at least; that of an autoscaled pool is its lower bound."""
        return self.wanted | {role: bounds.least for role, bounds in self._autoscale.items()}

    def size(self, role: str) -> int:
        """Number of instances of a role that serve and are not leaving, or are being started."""
        return len(self._staying(role)) + self._starter.num_coming(role, besides=self._spare())

    def _staying(self, role: str) -> list[str]:
        without = {*self._stopper.leaving, self._spare()}
        return [n for n, r in self._register.roles().items() if r == role and n not in without]

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
        lonely_prefill = after["prefill"] and not after["decode"] and not after["neutral"]
        if lonely_prefill or (after["decode"] and not after["prefill"]):
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
        for instance_id in [name for name, of in self.stopped.items() if of == role]:
            if self.size(role) < size and instance_id in self._register:
                del self.stopped[instance_id]
                self._stopper.drain(instance_id, False, reason)
        self._start(role, size - self.size(role), reason)
        while self.size(role) > size and self._starter.unqueue(role):
            pass
        candidates = sorted(self._staying(role), key=self._register.num_requests)
        self._stop(role, candidates[: max(0, self.size(role) - size)], reason)

    def trim(self, reason: str) -> None:
        """Stops the newest instances of each pool that is larger than wanted, for a manager that takes over.

        The managers before it may have started more: two of them that worked at the same time, or one that
        could not end an instance.
        """
        for role, wanted in self.wanted.items():
            if role not in self._autoscale:
                newest = sorted(self._staying(role), key=lambda name: -int(name.rpartition("-")[2]))
                self._stop(role, newest[: max(0, self.size(role) - wanted)], reason)

    def _stop(self, role: str, instances: list[str], reason: str) -> None:
        for instance_id in instances:
            self._stopper.drain(instance_id, True, reason)
            self._stopper.stop_drained(instance_id, reason)
            self.stopped[instance_id] = role

    def keep(self, reason: str) -> None:
        """Starts what is missing of the pools whose dead instances are replaced, and of lower bounds."""
        self.stopped = {name: role for name, role in self.stopped.items() if name in self._register}
        for role, wanted in self.wanted.items():
            if (bounds := self._autoscale.get(role)) is not None:
                self._start(role, bounds.least - self.size(role), reason)
            elif self._replaces:
                self._start(role, wanted - self.size(role), reason)

    def _start(self, role: str, number: int, reason: str) -> None:
        for _ in range(number):
            self._starter.start_until_ready(role, reason)

    def stop_one(self, instance_id: str) -> None:
        """Stops an instance for the operator, and makes its pool smaller by one. Idempotent."""
        if instance_id not in self.stopped:
            role = self.stopped[instance_id] = self._register.role_of(instance_id)
            self.wanted[role] = max(0, self.wanted[role] - 1)
            self._stopper.stop_drained(instance_id, "drained by the operator")

    def use_again(self, instance_id: str) -> None:
        """The operator uses an instance again: its pool gets its size back, if that was the reason."""
        if (role := self.stopped.pop(instance_id, None)) is not None:
            self.wanted[role] += 1

    def on_death(self, instance_id: str) -> None:
        """Starts an instance in place of a dead one, if its pool is too small now."""
        self.stopped.pop(instance_id, None)
        self.keep(f"in the place of {instance_id}, which has died")

    def _on_role_change(self, instance_id: str, old: str, new: str) -> None:
        if instance_id in self.stopped:
            self.stopped[instance_id] = new
        elif instance_id not in self._stopper.leaving:
            self.wanted[old] = max(0, self.wanted[old] - 1)
            self.wanted[new] += 1
