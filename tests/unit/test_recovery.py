"""The training loop and its recovery from lost learners, over fakes and real checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import make_group, make_prompt, make_snapshot

from tora.batching.batch import micro_batches
from tora.config.schema import CheckpointConfig, ModelConfig, RunConfig, SyncConfig
from tora.errors import LearnerLost, TrainingError
from tora.reporting.metrics import NoLog
from tora.run.bad_steps import BadSteps
from tora.run.canary import Canary
from tora.run.checkpoints import Checkpoints, RunState
from tora.run.loop import train
from tora.run.recovery import train_and_export
from tora.run.run import Run
from tora.types import (
    EvalResult,
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

    def __init__(self, dies_in: int | None = None, bad: Sequence[int] = ()) -> None:
        self.version, self._dies_in, self._bad = 0, dies_in, bad
        self.saved: list[int] = []

    def step(self, batch: TrainBatch) -> StepResult:
        if self.version == self._dies_in:
            raise LearnerLost("the learner is lost")
        self.version += 1
        return StepResult(self.version, {}, "loss is nan" if self.version - 1 in self._bad else "")

    def snapshot(self) -> SnapshotRef:
        return make_snapshot(self.version)

    def logprobs(self, batch: MicroBatch, *, adapter: bool) -> np.ndarray:
        raise AssertionError("the canary is off")

    def save(self, folder: Path) -> None:
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

    def publish(self, snapshot: Any) -> Metrics:
        self.events.append(f"publish {snapshot.version}")
        return {"sync/bytes": 8.0}

    def evaluate(self) -> EvalResult:
        raise AssertionError("the config has no eval")

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> dict[int, list[np.ndarray]]:
        raise AssertionError("the canary is off")

    def state(self) -> RolloutState:
        return RolloutState(self.cursor)

    def rewind(self, state: RolloutState, version: int) -> None:
        self.cursor = state.cursor
        self.events.append(f"rewind {version}")

    def close(self) -> None: ...


def make_run(folder: Path, learners: list[FakeLearner], **changes: Any) -> Run:
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
        **values,
    )


def test_a_run_trains_publishes_saves_and_exports(tmp_path: Path) -> None:
    run = make_run(tmp_path, [FakeLearner()])
    outcome = train_and_export(run)
    assert run.rollouts.events == [f"publish {version}" for version in range(6)]
    assert (run.state.step, outcome.bytes_per_sync, outcome.before, outcome.after) == (5, 8, None, None)
    assert [f.name for f in sorted((tmp_path / "checkpoints").iterdir())] == ["step_000004", "step_000005"]
    assert (tmp_path / "adapter").read_text() == "5"


def test_a_lost_learner_is_replaced_and_the_run_goes_back_to_its_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path, [FakeLearner(dies_in=3), FakeLearner()])
    state = run.state
    train_and_export(run)
    versions = [0, 1, 2, 3], [2, 3, 4, 5]
    events = [*(f"publish {v}" for v in versions[0]), "rewind 2", *(f"publish {v}" for v in versions[1])]
    assert run.rollouts.events == events
    assert run.state is state and state.step == 5, "holders of the state see the recovery"
    assert state.rollouts.cursor == 5, "each prompt counts once in the history that survives"


def test_without_a_checkpoint_a_lost_learner_starts_the_run_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, [FakeLearner(dies_in=1), FakeLearner()])
    train_and_export(run)
    assert run.rollouts.events[:4] == ["publish 0", "publish 1", "rewind 0", "publish 0"]
    assert run.rollouts.state().cursor == 5


@pytest.mark.parametrize(("dies_in", "words"), [(3, "continues from step 2"), (1, "there is no checkpoint")])
def test_too_many_losses_end_the_run(tmp_path: Path, dies_in: int, words: str) -> None:
    run = make_run(tmp_path, [FakeLearner(dies_in)])
    with pytest.raises(LearnerLost, match=f"max_learner_restarts=0 is used up; .*{words}"):
        train_and_export(run)
    assert run.state.step == (2 if dies_in == 3 else 0) and not (tmp_path / "adapter").exists()


def test_a_stop_saves_a_checkpoint_to_resume_from(tmp_path: Path) -> None:
    answers = iter([False, False, False, True])  # asked before and after each step
    run = make_run(tmp_path, [FakeLearner()], stop_requested=lambda: next(answers))
    train(run)
    assert run.state.step == 2 and run.checkpoints.newest() == tmp_path / "checkpoints" / "step_000002"

    waiting = make_run(tmp_path / "waiting", [FakeLearner()], stop_requested=lambda: True)
    train(waiting)
    assert waiting.state.step == 0 and waiting.checkpoints.newest() == tmp_path / "waiting/checkpoints/step_000000"

    state = run.checkpoints.read(tmp_path / "checkpoints" / "step_000002", make_prompt)
    resumed = make_run(tmp_path, [FakeLearner()], state=state)
    resumed.learner.restore(tmp_path / "checkpoints" / "step_000002")
    seconds = state.seconds
    outcome = train(resumed)
    assert resumed.state.step == 5 and outcome.seconds > seconds > 0


class Warnings(NoLog):
    def __init__(self) -> None:
        self.sentences: list[str] = []

    def warning(self, sentence: str) -> None:
        self.sentences.append(sentence)


def names(folder: Path) -> list[str]:
    return [f.name for f in sorted((folder / "checkpoints").iterdir())]


def test_too_many_bad_steps_end_the_run_and_keep_the_last_good_checkpoints(tmp_path: Path) -> None:
    run = make_run(tmp_path, [FakeLearner(bad=(2, 3, 4))])
    run.cfg, run.log = dataclasses.replace(run.cfg, checkpoint=CheckpointConfig(every=1)), Warnings()
    with pytest.raises(TrainingError) as error:
        train(run)
    assert str(error.value) == (
        "3 bad steps in a row end the run (max_bad_steps=3), the last being step 5: loss is nan; "
        "resume_from_checkpoint=true continues from step_000002."
    )
    assert run.log.sentences == [f"step {n} is left out: loss is nan" for n in (3, 4, 5)]
    assert names(tmp_path) == ["step_000001", "step_000002"]
    assert run.rollouts.events[-1] == "publish 5", "versions go on, since every later step counts on them"


def test_a_checkpoint_that_is_due_waits_for_a_good_step(tmp_path: Path) -> None:
    learner = FakeLearner(bad=(1,))
    train(make_run(tmp_path, [learner]))
    assert learner.saved == [3, 4, 5], "due after 2 and 4, and at the end"


def test_a_stop_after_a_bad_step_saves_and_deletes_nothing(tmp_path: Path) -> None:
    answers = iter([False] * 8 + [True])
    run = make_run(tmp_path, [FakeLearner(bad=(3,))], stop_requested=lambda: next(answers))
    run.cfg = dataclasses.replace(run.cfg, checkpoint=CheckpointConfig(every=1))
    train(run)
    assert names(tmp_path) == ["step_000002", "step_000003", "step_000004"]


def test_bad_steps_are_counted_in_a_row() -> None:
    bad, good = StepResult(1, {}, "loss is nan"), StepResult(1, {})
    batch, empty = TrainBatch(MICRO_BATCHES, 1.0), TrainBatch((), 1.0)

    def count(limit: int, *steps: tuple[TrainBatch, StepResult]) -> int:
        counter = BadSteps(limit)
        for number, step in enumerate(steps, 1):
            counter.add(number, *step)
            counter.check(None)
        return counter.in_a_row

    assert count(2, (batch, bad), (batch, good), (batch, bad)) == 1
    assert count(0, *[(batch, bad)] * 99) == 99, "0: no limit"
    assert count(3, (batch, bad), (empty, good), (batch, bad)) == 2, "a step without anything to train says nothing"
    with pytest.raises(TrainingError, match=r"max_bad_steps=1\), the last being step 1: .*; no checkpoint yet\.$"):
        count(1, (batch, bad))
