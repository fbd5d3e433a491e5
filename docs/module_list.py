"""Writes the modules of each package into the table of docs/architecture.md.

`python -m docs.module_list` rewrites the last column between the markers and adds a row for a new package, to
be described by hand; `tests/unit/test_docs.py` compares the table with the code.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("pd_serve", "migration", "router")
UNDESCRIBED = "(describe it)"
BEGIN, END = "<!-- begin modules -->\n", "<!-- end modules -->\n"


def updated(page: str) -> str:
    """The page with the modules that there are."""
    before, begin, rest = page.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("no markers for the modules")
    described = dict(re.findall(r"^\| `([\w/]+/)` \| (.*?) \| .*\|$", table, re.MULTILINE))
    found = modules()
    packages = [name for name in described if name in found] + [n for n in found if n not in described]
    rows = [
        f"| `{name}` | {described.get(name, UNDESCRIBED)} | {', '.join(found[name])} |" for name in packages
    ]
    return (
        before
        + begin
        + "\n".join(["| package | what it is | modules |", "|---|---|---|", *rows])
        + f"\n{end}{after}"
    )


def modules() -> dict[str, list[str]]:
    """Modules in backquotes by package, such as "router/dispatch/"."""
    found: dict[str, list[str]] = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        if path.stem != "__init__":
            package = path.parent.relative_to(ROOT).as_posix() + "/"
            found.setdefault(package, []).append(f"`{path.stem}`")
    return found


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
