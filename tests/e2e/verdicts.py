"""What clients and test suites found at plain vLLM and at a cluster, side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pd_serve.observe import provenance as report


class Verdicts:
    """All comparisons of a run, by suite and check."""

    def __init__(self) -> None:
        self._suites: dict[str, dict[str, dict[str, Any]]] = {}
        self._clients: dict[str, str] = {}

    def compare(self, suite: str, check: str, theirs: Any, ours: Any) -> None:
        """Both are kept, then they have to be equal.

        Args:
            theirs, ours: JSON values: what plain vLLM made the client see, and what the cluster did.
        """
        same = theirs == ours
        self._suites.setdefault(suite, {})[check] = {"vllm": theirs, "pd-serve": ours, "same": same}
        assert ours == theirs, f"{suite}, {check}"

    def compare_all(self, suite: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        """The same for many checks of one suite. All of them are kept before one fails."""
        assert theirs, f"{suite} has checked nothing"
        wrong = []
        for check in theirs.keys() | ours.keys():
            try:
                self.compare(suite, check, theirs.get(check), ours.get(check))
            except AssertionError:
                wrong.append(check)
        assert {name: ours.get(name) for name in wrong} == {name: theirs.get(name) for name in wrong}, suite

    def tried(self, client: str, its_version: str) -> None:
        """Which version of a client was used."""
        self._clients[client] = its_version

    def write(self, path: Path) -> None:
        """One JSON file, with a summary first."""
        suites = {name: dict(sorted(checks.items())) for name, checks in sorted(self._suites.items())}
        checks = [check for suite in suites.values() for check in suite.values()]
        summary = {
            "checks": len(checks),
            "same": sum(check["same"] for check in checks),
            "suites": {name: len(checks) for name, checks in suites.items()},
        }
        result = {
            "summary": summary,
            "clients": dict(sorted(self._clients.items())),
            **report.provenance(),
            "command": "make compat",
            "suites": suites,
        }
        report.write(path, result)
