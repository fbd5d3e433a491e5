"""The output of one benchmark: tables on the terminal, and a JSON file with the run's provenance."""

from pathlib import Path
from typing import Any

from rich.table import Table

from loadtests.terminal import new_console
from pd_serve.observe import provenance


class BenchmarkReport:
    """Create it before the measurement: it records machine, load average and versions at once.

    Args:
        json_file: Where to write; None for the terminal only.

    Attributes:
        provenance: Written beside the numbers.
    """

    def __init__(self, json_file: Path | None) -> None:
        self.console = new_console()
        self.provenance = provenance.provenance()
        self._json_file = json_file

    def show(self, table: Table) -> None:
        """Prints a table."""
        self.console.print(table)

    def write(self, numbers: dict[str, Any]) -> None:
        """Writes all numbers so far in place of those before."""
        if self._json_file is not None:
            provenance.write(self._json_file, self.provenance | numbers)
            self.console.print(f"written to {self._json_file}")
