"""One step of the training loop: its groups, as one batch or in parts, and the learner's update."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from tora.batching.train_batch import joined
from tora.run.run import Run
from tora.types import Metrics, StepResult, TrainBatch


@dataclass(frozen=True, slots=True)
class TrainedStep:
    batch: TrainBatch
    """Of the whole step."""
    result: StepResult
    metrics: Metrics
    """The seconds that the step waited for rollouts, those that the learner took, and the number of parts."""


def train_step(run: Run, step: int) -> TrainedStep | None:
    """Train on the groups of a step, after which `run.state` is one further.

    None if a stop is requested before all are finished. Those that the learner has had are then still to be trained.
    """
    parts: list[TrainBatch] = []
    waited_s = learned_s = 0.0
    while True:
        began = time.perf_counter()
        batch = run.rollouts.next_batch(step, run.stop_requested)
        if batch is None:
            return None
        run.is_stepping, generated = True, time.perf_counter()
        parts.append(batch)
        bare = replace(batch, groups=())
        result = run.learner.step(bare) if batch.is_last else run.learner.accumulate(bare)
        waited_s += generated - began
        learned_s += time.perf_counter() - generated
        if result is not None:
            run.state.step, run.is_stepping = step + 1, False
            whole = joined(parts) if len(parts) > 1 else batch
            own = {"time/rollout_s": waited_s, "time/learner_s": learned_s, "learner/parts": float(len(parts))}
            return TrainedStep(whole, result, own)
        run.is_stepping = False
