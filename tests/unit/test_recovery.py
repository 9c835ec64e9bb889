"""The training loop and its recovery from lost learners, over fakes and real checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from fake_runs import MICRO_BATCHES, FakeLearner, Warnings, make_run, names
from fakes import make_prompt

from tora.config.schema import CheckpointConfig
from tora.errors import LearnerLost, TrainingError
from tora.run.bad_steps import BadSteps
from tora.run.loop import train
from tora.run.recovery import train_and_export
from tora.types import (
    StepResult,
    TrainBatch,
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
    run = make_run(tmp_path, [FakeLearner(dies_in=dies_in)])
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
            counter.check(lambda: None)
        return counter.in_a_row

    assert count(2, (batch, bad), (batch, good), (batch, bad)) == 1
    assert count(0, *[(batch, bad)] * 99) == 99, "0: no limit"
    assert count(3, (batch, bad), (empty, good), (batch, bad)) == 2, "a step without anything to train says nothing"
    with pytest.raises(TrainingError, match=r"max_bad_steps=1\), the last being step 1: .*; no checkpoint yet\.$"):
        count(1, (batch, bad))


def test_a_run_may_be_ended_at_once_until_its_first_step_and_while_its_learner_restarts(tmp_path: Path) -> None:
    told: list[tuple[bool, int]] = []
    run = make_run(tmp_path, [FakeLearner(dies_in=3), FakeLearner()])
    run.let_save = lambda saves: told.append((saves, run.state.step))
    train_and_export(run)
    assert told == [(True, 0), (False, 2), (True, 2)]


def test_a_learner_lost_while_the_run_stops_is_not_restarted(tmp_path: Path) -> None:
    run = make_run(tmp_path, [FakeLearner(dies_in=3), FakeLearner()])

    class Stopping(FakeLearner):
        """The stop arrives in the step in which the learner dies."""

        def step(self, batch: TrainBatch) -> StepResult:
            if self.version == 3:
                run.stop_requested = lambda: True
            return super().step(batch)

    run.learner = Stopping(dies_in=3)
    with pytest.raises(LearnerLost, match="while the run was stopping"):
        train_and_export(run)


def test_a_new_checkpoint_starts_the_count_of_restarts_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, [FakeLearner(dies_in=3), FakeLearner(dies_in=4), FakeLearner()])
    run.cfg = dataclasses.replace(run.cfg, max_learner_restarts=1)
    train_and_export(run)
    assert run.state.step == 5
