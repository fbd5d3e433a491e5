"""Servers that files of end-to-end tests share, and the order of files that follows from that."""

import re
from functools import cache
from pathlib import Path

E2E_TESTS = Path(__file__).parent / "e2e"

#: The fixtures, by what a module does with them. A server is ended when the next file does not use it.
USE = {
    "reference": re.compile(r"\breference: Reference\b"),
    "cluster": re.compile(r"def server\(cluster: ServerProcess\)"),
    "simulated": re.compile(r"def server\(simulated: ServerProcess\)"),
}

#: By name, largest first, so that two processes end at about the same time; "" is a file of its own.
GROUPS = ("reference", "simulated", "")


@cache
def used_servers(file: Path) -> frozenset[str]:
    if E2E_TESTS not in file.parents:
        return frozenset()
    text = file.read_text()
    return frozenset(name for name, use in USE.items() if use.search(text))


def group(file: Path) -> str:
    """A name for the files that one process has to run: those with plain vLLM or `cluster`; `simulated`."""
    used = used_servers(file)
    return "" if not used else "simulated" if "simulated" in used else "reference"


def order(file: Path) -> tuple[int, int]:
    """Files of a group come together, those that need the fewest of its servers last."""
    return GROUPS.index(group(file)), -len(used_servers(file) & {"cluster"})
