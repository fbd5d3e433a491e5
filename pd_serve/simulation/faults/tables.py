"""Finds what a process still keeps of requests and peers that are gone, in whatever table it is."""

import enum
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MethodType, NoneType
from typing import Any

from migration.tasks import BackgroundTasks

#: Packages whose objects are looked into.
PACKAGES = ("pd_serve.", "migration.", "router.")

#: Modules whose objects belong to the simulation, not to a process.
OUTSIDE = ("pd_serve.simulation.", "pd_serve.simulated_engine.contents", "pd_serve.simulated_engine.settings")

#: Tables that keep what is gone, up to a number or a time, by class and attribute, and why. None has tasks.
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


class Form(enum.Enum):
    """What the values of a type are to the search."""

    PLAIN = enum.auto()  # not looked into
    TEXT = enum.auto()
    MAPPING = enum.auto()
    COLLECTION = enum.auto()
    METHOD = enum.auto()
    OBJECT = enum.auto()


#: Forms of values that name nothing, or one thing.
_SINGLE = (Form.PLAIN, Form.TEXT)

_SLOTS: dict[type, tuple[str, ...]] = {}
_FORMS: dict[type, Form] = {}


def num_tasks(root: object) -> int:
    """Number of tasks that all objects of a process run together."""
    found: list[BackgroundTasks] = []
    for _ in remains(root, lambda text: False, visit=found.append):
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
    kept = frozenset(kept)
    seen: set[int] = set()
    queue: deque[object] = deque([root])
    lines: list[str] = []
    while queue:
        found = queue.popleft()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, BackgroundTasks):
            visit(found)
            continue
        for name, value in _attributes(found):
            if _form(value) in _SINGLE:
                continue
            place = f"{type(found).__name__}.{name}"
            if place not in kept and type(value).__name__ not in kept:
                _look_into(place, value, is_gone, queue, seen, lines)
    yield from lines


def _attributes(value: object) -> Iterator[tuple[str, object]]:
    kind = type(value)
    if (slots := _SLOTS.get(kind)) is None:
        slots = _SLOTS[kind] = _slots(kind)
    for name in slots:
        if (found := getattr(value, name, None)) is not None:
            yield name, found
    if (attributes := getattr(value, "__dict__", None)) is not None:
        yield from attributes.items()


def _slots(kind: type) -> tuple[str, ...]:
    found: list[str] = []
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        found += (slots,) if isinstance(slots, str) else slots
    return (*found, *getattr(kind, "__struct_fields__", ()))


def _form(value: object) -> Form:
    kind = type(value)
    if (form := _FORMS.get(kind)) is None:
        form = _FORMS[kind] = _form_of(kind)
    return form


def _form_of(kind: type) -> Form:
    if issubclass(kind, str):
        return Form.TEXT
    if issubclass(kind, int | float | bytes | NoneType):
        return Form.PLAIN
    if issubclass(kind, Mapping):
        return Form.MAPPING
    if issubclass(kind, list | tuple | set | frozenset | deque):
        return Form.COLLECTION
    if issubclass(kind, MethodType):
        return Form.METHOD
    is_looked_into = kind.__module__.startswith(PACKAGES) and not kind.__module__.startswith(OUTSIDE)
    return Form.OBJECT if is_looked_into else Form.PLAIN


def _look_into(
    place: str,
    value: Any,
    is_gone: Callable[[str], bool],
    queue: deque[object],
    seen: set[int],
    lines: list[str],
) -> None:
    """Adds a line for each entry of one attribute that names something gone; other objects are queued."""
    form = _form(value)
    if form is Form.METHOD:
        value = value.__self__
        if _form(value) is Form.OBJECT:
            queue.append(value)
    elif form is Form.OBJECT:
        queue.append(value)
    elif value and id(value) not in seen:
        seen.add(id(value))
        entries = (*value, *value.values()) if form is Form.MAPPING else value
        for entry in entries:
            form = _form(entry)
            if form is Form.TEXT:
                if is_gone(entry):
                    lines.append(f"{place} has {entry!r}")
            elif form is not Form.PLAIN:
                _look_into(place, entry, is_gone, queue, seen, lines)
