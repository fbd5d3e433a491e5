"""The class of a request's priority."""

from enum import IntEnum


class PriorityClass(IntEnum):
    """How the scheduler treats a request. The order is the order of service."""

    HIGH = 0
    NORMAL = 1

    @property
    def label(self) -> str:
        """The name in reports: "high" or "normal"."""
        return self.name.lower()


def priority_class(priority: int) -> PriorityClass:
    """The class of a vLLM priority, where lower numbers are served earlier and 0 is the default."""
    return PriorityClass.HIGH if priority < 0 else PriorityClass.NORMAL
