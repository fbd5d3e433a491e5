"""Which process runs which instances: one each, or several simulated ones."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class InstanceProcess:
    """A process of instances.

    Attributes:
        actor: Ray's handle.
        places: Instances that it still takes; none once an instance has left it. So a process that has run
            for long ends when its instances have been replaced, and one that fails gets nothing new.
        instances: Ids of those that it starts or runs.
    """

    name: str
    actor: Any
    places: int
    instances: set[str]


class InstanceProcesses:
    """The processes by their instances. Iterates over processes.

    Args:
        places: Number of instances that a process runs in its life.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._by_instance: dict[str, InstanceProcess] = {}

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self._by_instance

    def __getitem__(self, instance_id: str) -> InstanceProcess:
        return self._by_instance[instance_id]

    def __iter__(self) -> Iterator[InstanceProcess]:
        return iter(dict.fromkeys(self._by_instance.values()))

    def name_of_new(self, instance_id: str) -> str:
        """Name of a process whose first instance this is; it is not used again, as ids are not."""
        return instance_id if self.places == 1 else f"process-of-{instance_id}"

    def add(self, instance_id: str, name: str, actor: Any) -> None:
        """Adds a new process with its first instance."""
        self._by_instance[instance_id] = InstanceProcess(name, actor, self.places - 1, {instance_id})

    def found(self, name: str, actor: Any, instances: Iterable[str]) -> InstanceProcess:
        """Adds a process that the last manager has started. It takes no further instances."""
        process = InstanceProcess(name, actor, 0, set(instances))
        self._by_instance |= dict.fromkeys(process.instances, process)
        return process

    def place(self, instance_id: str) -> bool:
        """Assigns a new instance to a process with a place. Returns False if there is none."""
        for process in self:
            if process.places:
                process.places -= 1
                process.instances.add(instance_id)
                self._by_instance[instance_id] = process
                return True
        return False

    def remove(self, instance_id: str) -> InstanceProcess | None:
        """Removes an instance that ends, and a process without others. Returns its process, if known."""
        process = self._by_instance.pop(instance_id, None)
        if process is not None:
            process.instances.discard(instance_id)
            process.places = 0
        return process

    def clear(self) -> list[InstanceProcess]:
        """Removes and returns all."""
        processes = list(self)
        self._by_instance.clear()
        return processes
