"""The paper's plotted points, where a file has them. Everything works without it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pd_serve.errors import InvalidRequestError

#: Where the points lie beside the project, if they do.
BESIDE = Path(__file__).resolve().parents[3].parent / "shared" / "paper_figures.json"


@dataclass(frozen=True)
class Reference:
    """Points by names, as the file nests them."""

    points: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> "Reference":
        """From a file, or from where the project has it; nothing if it has none.

        Raises:
            InvalidRequestError: The file that was asked for cannot be read.
        """
        if path is None and not BESIDE.is_file():
            return cls()
        try:
            found = json.loads((path or BESIDE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidRequestError(
                f"the reference {path or BESIDE.name} cannot be read: {error}"
            ) from error
        if not isinstance(found, dict):
            raise InvalidRequestError(f"the reference {path} holds no points by name")
        return cls(found)

    def values(self, *names: str) -> list[float]:
        """A list of points; empty if there is none of these names."""
        at: Any = self.points
        for name in names:
            at = at.get(name) if isinstance(at, dict) else None
        return [float(value) for value in at] if isinstance(at, list) else []

    def curve(self, *names: str, x: str, y: str) -> dict[float, float]:
        """y by x of one series; empty if it is not there."""
        return dict(zip(self.values(*names, x), self.values(*names, y), strict=False))
