"""What the manager tells the operator."""

from typing import Protocol


class OperatorNotices(Protocol):
    """Progress and warnings for the operator."""

    def step(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
