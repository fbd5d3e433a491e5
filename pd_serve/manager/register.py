"""The instances that serve, and their last load reports."""

import asyncio
from collections.abc import Callable

from pd_serve.comm.leases import LeaseClock, Leases
from pd_serve.comm.membership import InstanceInfo
from pd_serve.comm.timing import INSTANCE_LEASE_S
from router.dispatch import STARTING
from router.load import ROLES, InstanceLoad


class InstanceRegister:
    """Ready instances with their last load reports and leases.

    Attributes:
        infos: By instance id.
        on_role_change: Called with instance id, old and new role, after a report with another role.
    """

    def __init__(self, clock: LeaseClock) -> None:
        self._loop = asyncio.get_running_loop()
        self.infos: dict[str, InstanceInfo] = {}
        self._loads: dict[str, InstanceLoad] = {}
        self._leases = Leases(INSTANCE_LEASE_S, clock)
        self._ready_at: dict[str, float] = {}
        self._roles: dict[str, str] = {}
        self.on_role_change: Callable[[str, str, str], None] = lambda instance_id, old, new: None

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self.infos

    def __len__(self) -> int:
        return len(self.infos)

    def add(self, info: InstanceInfo, role: str = "") -> None:
        """Adds a ready instance; with its present role, if that is not the one of its start."""
        self.infos[info.instance_id] = info
        self._roles[info.instance_id] = role or info.role
        self._ready_at[info.instance_id] = self._loop.time()
        self._leases.renew(info.instance_id)

    def remove(self, instance_id: str) -> None:
        for table in (self.infos, self._loads, self._ready_at, self._roles):
            table.pop(instance_id, None)
        self._leases.drop(instance_id)

    def on_report(self, load: InstanceLoad) -> None:
        """Keeps a load report and renews the lease. Ignores instances that are not registered."""
        if load.instance_id in self.infos:
            self._loads[load.instance_id] = load
            self._leases.renew(load.instance_id)
            if (role := self._roles[load.instance_id]) != load.role:
                self._roles[load.instance_id] = load.role
                self.on_role_change(load.instance_id, role, load.role)

    def load_of(self, instance_id: str) -> InstanceLoad | None:
        """Last load report of an instance; None before the first one."""
        return self._loads.get(instance_id)

    def role_of(self, instance_id: str) -> str:
        """Present role of an instance."""
        return self._roles[instance_id]

    def roles(self) -> dict[str, str]:
        """Present roles, by instance id."""
        return dict(self._roles)

    def num_requests(self, instance_id: str) -> int:
        load = self._loads.get(instance_id)
        return load.running + load.waiting if load is not None else 0

    def age_s(self, instance_id: str) -> float:
        """Time since the instance was ready, in seconds."""
        return self._loop.time() - self._ready_at[instance_id]

    def silent(self) -> list[str]:
        """Instances whose lease has expired."""
        return self._leases.expired()

    def hanging(self) -> list[str]:
        """Instances whose process reports that their engine's step has exceeded its bound."""
        return [name for name, load in self._loads.items() if load.hangs]

    def can_serve(self) -> bool:
        """Whether requests can be prefilled and decoded."""
        roles = set(self._roles.values())
        return "neutral" in roles or {"prefill", "decode"} <= roles

    def why_needed(self, instance_id: str, unused: set[str]) -> str | None:
        """Why the cluster could not serve without this instance; None if it could."""
        unused = {instance_id, *unused, *(name for name, load in self._loads.items() if load.draining)}
        # One that has just become ready has not reported its load yet.
        roles = {role for name, role in self._roles.items() if name not in unused}
        if roles.isdisjoint(STARTING):
            return f"{instance_id} is the last instance that takes new requests"
        if roles == {"prefill"}:
            return f"{instance_id} is the last decode instance"
        return None

    def in_order(self) -> list[InstanceInfo]:
        """All instances by role and number, whatever the order in which they became ready."""
        return sorted(self.infos.values(), key=_by_role_and_number)


def _by_role_and_number(info: InstanceInfo) -> tuple[int, int]:
    return ROLES.index(info.role), int(info.instance_id.rpartition("-")[2])
