"""A run of the training loop over fakes, with real checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fakes import make_group, make_prompt, make_snapshot

from tora.batching.batch import micro_batches
from tora.config.schema import CheckpointConfig, ModelConfig, RunConfig, SyncConfig
from tora.errors import LearnerLost
from tora.reporting.metrics import NoLog
from tora.run.canary import Canary
from tora.run.checkpoints import Checkpoints, RunState
from tora.run.run import Run
from tora.types import (
    Group,
    LogprobRequest,
    Metrics,
    MicroBatch,
    RolloutState,
    SnapshotRef,
    StepResult,
    TrainBatch,
)

SETTINGS: dict[str, Any] = {"normalize_advantages": True, "normalization": "token", "max_generated_tokens": 9}
MICRO_BATCHES = micro_batches([make_group(make_prompt(0), [0.0, 1.0])], capacity=99, **SETTINGS)


class FakeLearner:
    """Counts versions; is lost in step `dies_in`; leaves the steps `bad` out."""

    def __init__(self, version: int = 0, *, dies_in: int | None = None, bad: Sequence[int] = ()) -> None:
        self.version, self._dies_in, self._bad = version, dies_in, bad
        self.saved: list[int] = []

    def step(self, batch: TrainBatch) -> StepResult:
        if self.version == self._dies_in:
            raise LearnerLost("the learner is lost")
        self.version += 1
        return StepResult(self.version, {}, "loss is nan" if self.version - 1 in self._bad else "")

    def accumulate(self, batch: TrainBatch) -> None:
        raise AssertionError("the config has step_parts=1")

    def snapshot(self) -> SnapshotRef:
        return make_snapshot(self.version)

    def logprobs(self, batch: MicroBatch, *, adapter: bool) -> np.ndarray:
        raise AssertionError("the canary is off")

    def try_out(self, on: bool) -> None:
        raise AssertionError("the canary is off")

    def end_save(self) -> None: ...

    def begin_save(self, folder: Path) -> None:
        (folder / "version").write_text(str(self.version))
        self.saved.append(self.version)

    def restore(self, folder: Path) -> None:
        self.version = int((folder / "version").read_text())

    def export(self, folder: Path) -> None:
        folder.write_text(str(self.version))


class FakeRollouts:
    """One prompt per step. Records what the loop asks of it."""

    def __init__(self) -> None:
        self.cursor, self.events = 0, list[str]()

    def next_batch(self, step: int, stop_requested: Callable[[], bool]) -> TrainBatch | None:
        if stop_requested():
            return None
        self.cursor += 1
        return TrainBatch(MICRO_BATCHES, 1.0, prompt_ids=(self.cursor,))

    def publish(self, snapshot: Any, *, generates: bool = True) -> Metrics:
        self.events.append(f"publish {snapshot.version}")
        return {"sync/bytes": 8.0}

    def start_evaluation(self, *, pinned: bool) -> None:
        raise AssertionError("the config has no eval")

    def evaluated(self, *, wait: bool) -> list[Group] | None:
        raise AssertionError("the config has no eval")

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> dict[int, list[np.ndarray]]:
        raise AssertionError("the canary is off")

    def state(self) -> RolloutState:
        return RolloutState(self.cursor)

    def rewind(self, state: RolloutState, version: int) -> None:
        self.cursor = state.cursor
        self.events.append(f"rewind {version}")

    def close(self) -> None: ...


def make_run(folder: Path, learners: list[FakeLearner], *, is_alone: bool = True, **changes: Any) -> Run:
    """A run of 5 steps with a checkpoint after every second; `learners` are used in turn."""
    cfg = RunConfig(
        name="test",
        num_steps=5,
        model=ModelConfig(path=""),
        dataset={},
        rewards=[],
        checkpoint=CheckpointConfig(every=2),
        sync=SyncConfig(canary_every=0),
        max_learner_restarts=len(learners) - 1,
    )
    values: dict[str, Any] = {"state": RunState(), "stop_requested": lambda: False, **changes}
    return Run(
        cfg=cfg,
        folder=folder,
        learner=learners.pop(0),
        make_learner=lambda: learners.pop(0),
        rollouts=FakeRollouts(),
        canary=Canary.from_config(cfg, [make_prompt(0)]),
        log=NoLog(),
        checkpoints=Checkpoints(folder / "checkpoints", keep=2),
        prompt_at=make_prompt,
        is_alone=is_alone,
        **values,
    )


class Warnings(NoLog):
    def __init__(self) -> None:
        self.sentences: list[str] = []

    def warning(self, sentence: str) -> None:
        self.sentences.append(sentence)


def names(folder: Path) -> list[str]:
    return [f.name for f in sorted((folder / "checkpoints").iterdir())]
