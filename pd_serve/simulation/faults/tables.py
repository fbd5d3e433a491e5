"""Finds what a process still keeps of requests and peers that are gone, in whatever table it is."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MethodType
from typing import Any

from migration.tasks import BackgroundTasks

#: Packages whose objects are looked into.
PACKAGES = ("pd_serve.", "migration.", "router.")

#: Modules whose objects belong to the simulation, not to a process.
OUTSIDE = ("pd_serve.simulation.", "pd_serve.simulated_engine.contents", "pd_serve.simulated_engine.settings")

#: Tables that keep what is gone, up to a number or a time, by class and attribute, and why.
KEPT = {
    "Llumlet._forwards": "aborts that are late; bounded by MAX_FORWARDS",
    "MigrationCoordinator._given_up": "late answers; a deque of bounded length",
    "MigrationCoordinator._incoming": "commits that answer questions for log_s; checked by what they hold",
    "RequestReporter._received": "requests that may be delivered twice; bounded by MAX_RECEIVED",
    "EndedRequests": "ends that may have to be sent again; bounded by number and time",
    "RequestRecorder": "timelines of the last requests; bounded",
    "DecisionLog": "the latest decisions; bounded",
    "HandlerFailures": "kinds of failures; checked by themselves",
    "Starter.next_numbers": "one number per role",
}


def num_tasks(root: object) -> int:
    """Number of tasks that all objects of a process run together."""
    found: list[BackgroundTasks] = []
    for _ in remains(root, lambda text: False, kept=(), visit=found.append):
        pass
    return sum(map(len, found))


def remains(
    root: object,
    is_gone: Callable[[str], bool],
    kept: Collection[str] = tuple(KEPT),
    visit: Callable[[BackgroundTasks], None] = lambda tasks: None,
) -> Iterator[str]:
    """Yields one line for each table entry that names something that is gone.

    Args:
        root: An object of the process; all objects that it reaches are looked at.
        is_gone: Whether a text is the id of something that is gone.
        visit: Called with each set of tasks on the way.
    """
    seen: set[int] = set()
    queue: deque[tuple[str, object]] = deque([(type(root).__name__, root)])
    while queue:
        _, found = queue.popleft()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, BackgroundTasks):
            visit(found)
            continue
        for name, value in _attributes(found):
            place = f"{type(found).__name__}.{name}"
            if place in kept or type(value).__name__ in kept:
                continue
            yield from _entries(place, value, is_gone, queue, seen)


def _attributes(value: object) -> Iterator[tuple[str, object]]:
    for name in _slots(type(value)):
        if hasattr(value, name):
            yield name, getattr(value, name)
    if (attributes := getattr(value, "__dict__", None)) is not None:
        yield from attributes.items()


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots
    yield from getattr(kind, "__struct_fields__", ())


def _entries(
    place: str,
    value: Any,
    is_gone: Callable[[str], bool],
    queue: deque[tuple[str, object]],
    seen: set[int],
) -> Iterator[str]:
    """The entries of one attribute that name something gone; other objects are queued."""
    if isinstance(value, str):
        return
    if isinstance(value, Mapping):
        if id(value) in seen:
            return
        seen.add(id(value))
        for key, entry in value.items():
            yield from _entry(place, entry, is_gone, queue, seen)
            yield from _entry(place, key, is_gone, queue, seen)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        if id(value) in seen:
            return
        seen.add(id(value))
        for entry in value:
            yield from _entry(place, entry, is_gone, queue, seen)
    else:
        owner = value.__self__ if isinstance(value, MethodType) else value
        module = type(owner).__module__
        if module.startswith(PACKAGES) and not module.startswith(OUTSIDE):
            queue.append((place, owner))


def _entry(
    place: str,
    entry: object,
    is_gone: Callable[[str], bool],
    queue: deque[tuple[str, object]],
    seen: set[int],
) -> Iterator[str]:
    if isinstance(entry, str):
        if is_gone(entry):
            yield f"{place} has {entry!r}"
    elif not isinstance(entry, int | float | bytes | None):
        yield from _entries(place, entry, is_gone, queue, seen)
