"""What the loop and the workers need; `tests/fakes.py` implements each in a few lines.

for step in range(state.step, cfg.num_steps):
    batch = rollouts.next_batch(step, stop_requested)
    result = learner.step(batch)
    rollouts.publish(learner.snapshot())
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tora.types import (
    Completion,
    EvalResult,
    FailedReward,
    LogprobRequest,
    Metrics,
    MicroBatch,
    Occupancy,
    PolicySnapshot,
    Prompt,
    RolloutState,
    SampleRequest,
    StepResult,
    SyncReport,
    TrainBatch,
)

if TYPE_CHECKING:
    import numpy as np


class Engine(Protocol):
    """One generator instance. Token ids in, token ids and log-probs out; knows nothing of Ray, prompts or rewards."""

    def generate(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        """Blocks until every completion is done; one list of `num_samples` completions per request, in order.

        May be called from several threads at once. Every token carries the version that sampled it.
        """
        ...

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> list[np.ndarray]:
        """Log-probs of each completion's tokens, [L] float32, at temperature 1 and untruncated, under the newest
        version; under the base where `adapter` is false."""
        ...

    def install(self, snapshot: PolicySnapshot) -> SyncReport:
        """Serve this policy version from now on. Every tensor is used or `SyncError` is raised.

        One caller at a time.
        """
        ...

    def occupancy(self) -> Occupancy:
        """How full it is. May be called from any thread at any time; answers at once."""
        ...

    def close(self) -> None: ...


class Rewarder(Protocol):
    """Scores the completions of one prompt."""

    def __call__(
        self, prompt: Prompt, texts: Sequence[str], token_ids: Sequence[Sequence[int]]
    ) -> list[dict[str, float] | FailedReward]:
        """Per completion one dict of unweighted reward parts, the run's first reward first, or why there is none.

        A completion is given as text, without special tokens, and as the token ids that the engine returned.
        """
        ...

    def total(self, parts: dict[str, float]) -> float:
        """Weighted sum of the parts."""
        ...

    def close(self) -> None: ...


class Learner(Protocol):
    """One learner: a rank in this process, or a handle over N ranks."""

    def step(self, batch: TrainBatch) -> StepResult: ...

    def snapshot(self) -> Any:
        """A `PolicySnapshot`, or a `SnapshotRef` that the run's `Rollouts` can resolve without copying it here."""
        ...

    def logprobs(self, batch: MicroBatch, *, adapter: bool) -> np.ndarray:
        """Log-probs of the response tokens, [N] float32, at temperature 1; under the base where `adapter` is false."""
        ...

    def save(self, folder: Path) -> None: ...

    def restore(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None:
        """Write the adapter in PEFT's format (the whole model for a full-weight run)."""
        ...


class Rollouts(Protocol):
    """Everything on the generating side. Sync and async runs differ in this object only."""

    def next_batch(self, step: int, stop_requested: Callable[[], bool]) -> TrainBatch | None:
        """None where a stop was requested while the step's groups were still to come."""
        ...

    def publish(self, snapshot: Any) -> Metrics: ...

    def evaluate(self) -> EvalResult: ...

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> dict[int, list[np.ndarray]]:
        """`Engine.logprobs` of every rollout worker that is up, by the worker's number."""
        ...

    def state(self) -> RolloutState:
        """What must be stored to go on with the same prompts."""
        ...

    def rewind(self, state: RolloutState, version: int) -> None:
        """Go back to where the run stood at this version; nothing is generated until the next `publish`."""
        ...

    def close(self) -> None: ...
