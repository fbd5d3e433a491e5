"""Measures the steps of a vLLM engine, in its scheduler."""

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from migration.step_times import StepTimes


class StepTimer:
    """Adds `step_times` to a vLLM scheduler class that follows it in the bases.

    A step lasts from its scheduling, or the end of the step before it if that is later, to its output.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the scheduler class's own

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step_times = StepTimes()
        self._begun_at: deque[float] = deque()  # of the steps in flight
        self._ended_at = 0.0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._begun_at.append(time.perf_counter())
        return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        now, begun_at = time.perf_counter(), self._begun_at.popleft()
        if tokens := scheduler_output.total_num_scheduled_tokens:
            # Each request that decodes has one token in the step.
            prompt_tokens = tokens - len(scheduler_output.num_scheduled_tokens)
            decodes = 1 in scheduler_output.num_scheduled_tokens.values()
            self.step_times.add(now - max(begun_at, self._ended_at), prompt_tokens, decodes=decodes)
        self._ended_at = now
        return outputs
