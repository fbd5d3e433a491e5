"""A clock that stands still until a test sets it."""

from dataclasses import dataclass


@dataclass
class ManualClock:
    """Returns `now`, in seconds, when it is called."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now
