"""Generates the state tables and the bounds in docs/migration.md from the code.

`python docs/state_tables.py` rewrites the parts between the markers; with `--check` it changes nothing and
exits with 1 where they differ (`tests/unit/test_docs.py` does the same).
"""

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from migration.bounds import MigrationBounds
from migration.destination_table import DESTINATION_TABLE
from migration.errors import RefusalCode
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
        handled = "<br>".join(f"{', '.join(events)} → {way}" for way, events in ways.items())
        lines.append(f"| **{state.name}** | {handled} | {', '.join(ignored)} |")
    return "\n".join(lines)


def bounds() -> str:
    """The bounds with their defaults, described by the class's own docstring."""
    text = " ".join((MigrationBounds.__doc__ or "").split("Attributes:")[1].split())
    descriptions = dict(re.findall(r"((?:\w+, )*\w+): (.*?)(?= (?:\w+, )*\w+: |$)", text))
    meaning = {name: text for names, text in descriptions.items() for name in names.split(", ")}
    defaults = MigrationBounds()
    lines = ["| bound | default | for |", "|---|---|---|"]
    for item in fields(MigrationBounds):
        unit = " B/s" if item.name.endswith("_bytes_per_s") else " s" if item.name.endswith("_s") else ""
        value = getattr(defaults, item.name)
        shown = "none" if value is None else f"{value:g}{unit}"
        lines.append(f"| `{item.name}` | {shown} | {meaning[item.name]} |")
    return "\n".join(lines)


def refusal_codes() -> str:
    """The codes of refusals, described by the comments of the enum."""
    described = re.findall(r"    (\w+) = auto\(\)  # (.*)", inspect.getsource(RefusalCode))
    lines = ["| code | the request did not move because |", "|---|---|"]
    return "\n".join(lines + [f"| `{RefusalCode[name]}` | {text} |" for name, text in described])


def _in_lines(events: list[str]) -> str:
    """Two events on a line, so that the picture stays narrow."""
    return "<br/>".join(", ".join(events[i : i + 2]) for i in range(0, len(events), 2))


PARTS: dict[str, Callable[[], str]] = {
    "source diagram": lambda: diagram(SOURCE_TABLE, "OFFERED"),
    "source table": lambda: rows(SOURCE_TABLE),
    "destination diagram": lambda: diagram(DESTINATION_TABLE, "RESERVING"),
    "destination table": lambda: rows(DESTINATION_TABLE),
    "bounds": bounds,
    "refusal codes": refusal_codes,
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
