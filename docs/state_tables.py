"""Writes what docs/migration.md says about the two state tables and the bounds, from the code itself.

`python docs/state_tables.py` rewrites the parts between the markers; with `--check` it changes nothing and
exits with 1 where they differ (`tests/unit/test_docs.py` does the same).
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from migration.bounds import MigrationBounds
from migration.destination_table import DESTINATION_TABLE
from migration.source_table import SOURCE_TABLE

PAGE = Path(__file__).with_name("migration.md")

Table = Mapping[Any, Mapping[Any, tuple[Any, tuple[Any, ...]]]]


def diagram(table: Table, initial: str) -> str:
    """A Mermaid state diagram: every way from one state to another, with the events that take it."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {initial}"]
    for state, row in table.items():
        ways: dict[StrEnum, list[str]] = {}
        for event, (following, _) in row.items():
            if following is not state:
                ways.setdefault(following, []).append(event.name)
        lines += [
            f"    {state.name} --> {following.name}: {_in_lines(events)}"
            for following, events in ways.items()
        ]
    return "\n".join([*lines, "```"])


def rows(table: Table) -> str:
    """A Markdown table with one row for each state."""
    lines = ["| state | event → next state: actions | ignored |", "|---|---|---|"]
    for state, row in table.items():
        ways: dict[str, list[str]] = {}
        ignored = []
        for event, (following, actions) in row.items():
            if following is state and not actions:
                ignored.append(event.name)
                continue
            done = ": " + ", ".join(action.name for action in actions) if actions else ""
            ways.setdefault(f"{following.name}{done}", []).append(event.name)
        said = "<br>".join(f"{', '.join(events)} → {way}" for way, events in ways.items())
        lines.append(f"| **{state.name}** | {said} | {', '.join(ignored)} |")
    return "\n".join(lines)


def bounds() -> str:
    """The bounds with their defaults, described by the class's own docstring."""
    text = " ".join((MigrationBounds.__doc__ or "").split("Attributes:")[1].split())
    described = dict(re.findall(r"((?:\w+, )*\w+): (.*?)(?= (?:\w+, )*\w+: |$)", text))
    meaning = {name: said for names, said in described.items() for name in names.split(", ")}
    defaults = MigrationBounds()
    lines = ["| bound | default | for |", "|---|---|---|"]
    for item in fields(MigrationBounds):
        unit = " B/s" if item.name.endswith("_bytes_per_s") else " s" if item.name.endswith("_s") else ""
        value = getattr(defaults, item.name)
        shown = "none" if value is None else f"{value:g}{unit}"
        lines.append(f"| `{item.name}` | {shown} | {meaning[item.name]} |")
    return "\n".join(lines)


def _in_lines(events: list[str]) -> str:
    """Two events on a line, so that the picture stays narrow."""
    return "<br/>".join(", ".join(events[i : i + 2]) for i in range(0, len(events), 2))


PARTS: dict[str, Callable[[], str]] = {
    "source diagram": lambda: diagram(SOURCE_TABLE, "OFFERED"),
    "source table": lambda: rows(SOURCE_TABLE),
    "destination diagram": lambda: diagram(DESTINATION_TABLE, "RESERVING"),
    "destination table": lambda: rows(DESTINATION_TABLE),
    "bounds": bounds,
}


def updated(page: str) -> str:
    """The page with all parts written anew. Raises: ValueError: a marker is missing."""
    for name, make in PARTS.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        before, found_begin, rest = page.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise ValueError(f"no markers for {name!r} in {PAGE.name}")
        page = f"{before}{begin}\n{make()}\n{end}{after}"
    return page


def main(arguments: list[str]) -> int:
    page = PAGE.read_text(encoding="utf-8")
    new = updated(page)
    if "--check" in arguments:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
