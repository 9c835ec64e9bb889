"""Steps that were left out because their loss or the norm of their gradient was not finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tora.errors import TrainingError
from tora.types import StepResult, TrainBatch


class BadSteps:
    """Counts bad steps in a row. A step without anything to train on is neither good nor bad."""

    def __init__(self, limit: int) -> None:
        """`limit`: this many in a row end the run; 0 for no limit."""
        self._limit, self._last = limit, ""
        self.in_a_row = 0

    def add(self, number: int, batch: TrainBatch, result: StepResult) -> str | None:
        """A sentence about this step if it was bad. `number`: the step's number, from 1."""
        if not result.bad:
            self.in_a_row = 0 if batch.micro_batches else self.in_a_row
            return None
        self.in_a_row += 1
        self._last = f"step {number}: {result.bad}"
        return f"step {number} is left out: {result.bad}"

    def check(self, newest_checkpoint: Callable[[], Path | None]) -> None:
        """Raises TrainingError if there are too many. Only then is the newest checkpoint looked for, which reads it."""
        if self._limit and self.in_a_row >= self._limit:
            checkpoint = newest_checkpoint()
            how = f"resume_from_checkpoint=true continues from {checkpoint.name}" if checkpoint else "no checkpoint yet"
            raise TrainingError(
                f"{self.in_a_row} bad steps in a row end the run (max_bad_steps={self._limit}), the last being "
                f"{self._last}; {how}."
            )
