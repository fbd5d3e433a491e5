"""The points of the Llumnix paper's plots (OSDI 2024), read off its figures into `paper_points.json`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pd_serve.errors import InvalidRequestError

DEFAULT = Path(__file__).with_name("paper_points.json")


@dataclass(frozen=True)
class PaperPoints:
    """Points by nested names, as in the file."""

    points: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> "PaperPoints":
        """Reads a file; None for the project's own.

        Raises:
            InvalidRequestError: The file cannot be read.
        """
        path = path or DEFAULT
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidRequestError(f"the reference {path} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise InvalidRequestError(f"the reference {path} holds no points by name")
        return cls(found)

    def values(self, *names: str) -> list[float]:
        """A list of points; empty if there is none with these names."""
        at: Any = self.points
        for name in names:
            at = at.get(name) if isinstance(at, dict) else None
        return [float(value) for value in at] if isinstance(at, list) else []

    def curve(self, *names: str, x: str, y: str) -> dict[float, float]:
        """y by x of one series; empty if there is none."""
        return dict(zip(self.values(*names, x), self.values(*names, y), strict=False))
