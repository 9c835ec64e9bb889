"""Steps that trained nothing, because no group had a training signal."""

from __future__ import annotations

from tora.types import TrainBatch


class IdleSteps:
    """Counts idle steps in a row."""

    def __init__(self, limit: int) -> None:
        """`limit`: this many in a row end the run; 0 for no limit."""
        self._limit = limit
        self.in_a_row = 0
        self._steps = 0
        self._idle = 0

    def add(self, number: int, batch: TrainBatch) -> str | None:
        """A sentence about this step if it is the first of a row that are idle. `number`: the step's, from 1."""
        self._steps += 1
        if batch.micro_batches:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        self._idle += 1
        mean = batch.metrics.get("reward/mean")
        rewards = "" if mean is None else f" (mean reward {mean:.3g})"
        of = f"none of its {len(batch.prompt_ids)} groups has rewards that differ{rewards}"
        return f"step {number} trained nothing: {of}" if self.in_a_row == 1 else None

    @property
    def all_idle(self) -> bool:
        """Whether there were steps and none of them trained anything."""
        return 0 < self._steps == self._idle

    @property
    def sentence(self) -> str:
        """Why the run has to end; empty if it need not."""
        if not self._limit or self.in_a_row < self._limit:
            return ""
        return (
            f"{self.in_a_row} steps in a row trained nothing, because the rewards of each group were equal "
            f"(max_idle_steps={self._limit}); the task may be solved or too hard, or the reward constant."
        )
