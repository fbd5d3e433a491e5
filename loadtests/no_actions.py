"""Actions of a scheduler that is measured by itself."""

from collections.abc import Mapping
from types import MappingProxyType

from router.load import InstanceLoad
from router.plugins import PolicyChoice
from router.request import NO_DEMAND, Demand


class NoActions:
    """Accepts the scheduler's commands and does nothing."""

    starting: Mapping[str, int] = MappingProxyType({})
    waiting: Demand = NO_DEMAND

    def move(self, source: str, destination: InstanceLoad, reason: str, selection: PolicyChoice) -> None: ...
    def set_role(self, instance_id: str, role: str, reason: str) -> None: ...
    def set_draining(self, instance_id: str, draining: bool, reason: str) -> None: ...
    def start(self, role: str, reason: str) -> None: ...
    def stop(self, instance_id: str, reason: str) -> None: ...
