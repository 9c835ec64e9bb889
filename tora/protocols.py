"""The interfaces between loop, learner, workers and engines. `tests/support/fakes.py` implements them in a few lines.

The training loop, in outline:

    for step in range(state.step, cfg.num_steps):
        batch = rollouts.next_batch(step, stop_requested)
        result = learner.step(batch)  # after `accumulate`, if the step comes in parts
        rollouts.publish(learner.snapshot())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tora.types import (
    Completion,
    FailedReward,
    Group,
    LogprobRequest,
    Metrics,
    MicroBatch,
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


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How full an engine is."""

    kv_usage: float = 0.0
    """Share of the KV cache in use, 0 to 1; 0 for an engine whose cache is not bounded."""
    preemptions: int = 0
    """How often the requests in flight have been evicted from the cache, to be recomputed later."""
    step_seconds: float = 0.0
    """How long the engine's present step has been running; 0 between steps, during the first one, which may compile,
    and for an engine that does not say."""


class Engine(Protocol):
    """One generator. Takes token ids, returns token ids and log-probs; knows nothing of Ray, prompts or rewards."""

    def generate(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        """Blocks until all completions are finished; returns a list of `num_samples` completions per request, in order.

        Thread-safe. Each token carries the policy version that sampled it. The requests of one call are all `pinned`
        or none is. Raises RolloutError if there is no snapshot yet.
        """
        ...

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> list[np.ndarray]:
        """Log-probs of each completion's tokens, [L] float32, at temperature 1 and without truncation.

        Under the newest policy version, or under the base model if `adapter` is false. Raises as `generate` does.
        """
        ...

    def install(self, snapshot: PolicySnapshot) -> SyncReport:
        """Serve this policy version from now on.

        Called by one thread at a time. Raises SyncError if a tensor is damaged or has no place in the engine.
        """
        ...

    def pin(self, snapshot: PolicySnapshot) -> SyncReport:
        """Hold this policy version beside the newest, for requests that are `pinned`; the one pinned before is dropped.

        Only for adapters, and for an engine that was made with room for it. Raises as `install` does.
        """
        ...

    def occupancy(self) -> Occupancy:
        """How full the engine is. Thread-safe and immediate."""
        ...

    def sleep(self) -> None:
        """Free the memory that only generation needs; the next call that generates or scores takes it back.

        Waits for running calls. An engine that has no such memory does nothing."""
        ...

    def close(self) -> None:
        """Shut the engine down."""
        ...


class Rewarder(Protocol):
    """Scores the completions of one prompt."""

    def __call__(
        self,
        prompt: Prompt,
        texts: Sequence[str | list[dict[str, Any]]],
        token_ids: Sequence[Sequence[int]],
        known: Mapping[int, list[float | FailedReward | None]] = ...,
        *,
        state: Any = ...,
        notes: Any = ...,
    ) -> list[dict[str, float] | FailedReward]:
        """One entry per completion: its unweighted reward parts, in the config's order, or the failure, which may have
        parts too.

        Each completion is given as text without special tokens, or as the messages of an episode, and as its token ids.
        `known`: the scores of functions that have been called already, by the reward's number. `state`: a
        `tora.rewards.notes.TrainerState`. `notes`, a `Notes`, is given what the functions log and print.
        """
        ...

    def total(self, parts: Mapping[str, float]) -> float:
        """The weighted sum of the parts: the reward."""
        ...

    def close(self) -> None:
        """End the rewarder's processes, if it has any."""
        ...


class Learner(Protocol):
    """Trains the policy: one rank in this process, or a handle to N ranks."""

    def step(self, batch: TrainBatch) -> StepResult:
        """Train on one batch of rollouts, and on the parts before it; the policy version grows by one."""
        ...

    def accumulate(self, batch: TrainBatch) -> None:
        """Compute the gradients of a part of a step that is not its last."""
        ...

    def snapshot(self) -> Any:
        """The current policy version, as a `PolicySnapshot` or as a `SnapshotRef` that the run's workers resolve."""
        ...

    def logprobs(self, batch: MicroBatch, *, adapter: bool) -> np.ndarray:
        """Log-probs of the response tokens, [N] float32, at temperature 1; under the base model if `adapter` is
        false."""
        ...

    def try_out(self, on: bool) -> None:
        """Add noise to every adapter's B, or take it away again to the bit."""
        ...

    def begin_save(self, folder: Path) -> None:
        """Begin to write all training state into `folder`, for `restore`. Returns once later steps no longer change
        it."""
        ...

    def end_save(self) -> None:
        """Returns once the files that `begin_save` began are written. May be called from another thread than the other
        methods. Raises OSError or SafetensorError if one cannot be written."""
        ...

    def restore(self, folder: Path) -> None:
        """Continue from the state that `save` wrote."""
        ...

    def export(self, folder: Path) -> None:
        """Write the adapter in PEFT's format, or the whole model if all weights are trained."""
        ...


class Rollouts(Protocol):
    """The generating side of a run. The only object in which synchronous and asynchronous runs differ."""

    def next_batch(self, step: int, stop_requested: Callable[[], bool]) -> TrainBatch | None:
        """The batch for this step, or its next part if that is not `is_last`. None if a stop was requested before the
        step's groups were finished."""
        ...

    def publish(self, snapshot: Any, *, generates: bool = True) -> Metrics:
        """Install the snapshot in every worker. Returns the sync's metrics. A requested stop ends the wait.

        `generates`: whether rollouts may begin under it. Without, before the first snapshot with which they do."""
        ...

    def start_evaluation(self, *, pinned: bool) -> None:
        """Begin to run the held-out prompts under the version that was published last. `pinned`: the run trains on
        meanwhile; otherwise `evaluated` comes next."""
        ...

    def evaluated(self, *, wait: bool) -> list[Group] | None:
        """The groups of the evaluation that was started last, one per prompt, in their order. None if they are not all
        finished, with `wait` only if a stop was requested before."""
        ...

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> dict[int, list[np.ndarray]]:
        """`Engine.logprobs` of every worker that is up, by worker number."""
        ...

    def state(self) -> RolloutState:
        """What a checkpoint stores so that a resumed run continues with the same prompts."""
        ...

    def rewind(self, state: RolloutState, version: int) -> None:
        """Return to an earlier state, taken at policy version `version`. Nothing is generated until the next
        `publish`."""
        ...

    def close(self) -> None:
        """Stop generating and shut the workers down."""
        ...
