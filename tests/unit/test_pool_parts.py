"""A step whose groups come in parts: the pool gives each group once, and the loop each part to the learner."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_runs import FakeLearner, FakeRollouts, make_run
from fakes import FakeWorker, make_group, make_prompt, make_snapshot
from pools import check_each_prompt_once, next_batch, running, some_without_signal
from pools import config as pool_config

from tora.batching.train_batch import joined, make_batch, make_part
from tora.config.load import load_config
from tora.config.parts import step_parts
from tora.config.schema import RunConfig
from tora.errors import ConfigError, LearnerLost
from tora.run.loop import train
from tora.run.recovery import train_and_export
from tora.types import Prompt, RolloutState, TrainBatch


def test_batches_of_parts_join_to_that_of_the_step() -> None:
    cfg = replace(pool_config(1), step_parts=2)
    groups = [make_group(make_prompt(i), [0.0, 1.0]) for i in range(4)]
    parts = [make_part(cfg, groups[:3], 0, 0), make_batch(cfg, groups, groups, 0, 0, 1.0, first=3)]
    step, expected = joined(parts), make_batch(replace(cfg, step_parts=1), groups, groups, 0, 0, 1.0)
    assert [part.is_last for part in parts] == [False, True] and step.is_last
    assert step.metrics == expected.metrics and step.prompt_ids == expected.prompt_ids == (0, 1, 2, 3)
    assert sorted({int(g) for m in step.micro_batches for g in m.groups_B}) == [0, 1, 2, 3]
    assert parts[0].prompt_ids == (0, 1, 2) and len(step.groups) == 4


# The pool


def parts_config(bound: int, parts: int = 4, **changes: Any) -> RunConfig:
    return replace(pool_config(bound, **changes), step_parts=parts)


def whole_step(rollouts: Any, step: int) -> tuple[TrainBatch, int]:
    """The last part, and how many there were."""
    number = 1
    while not (batch := next_batch(rollouts, step)).is_last:
        assert batch.groups and not batch.metrics
        number += 1
    return batch, number


class Gated(FakeWorker):
    """Groups of some prompts wait until they are let go."""

    def __init__(self, held: Sequence[int]) -> None:
        super().__init__()
        self.held = set(held)

    async def run_group(self, prompt: Prompt) -> Any:
        while prompt.id in self.held:
            await asyncio.sleep(0.002)
        return await super().run_group(prompt)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_learner_begins_before_the_slowest_group_is_there() -> None:
    worker = Gated([3])
    with running(parts_config(0, workers=1, concurrency=4), lambda: worker) as rollouts:
        rollouts.publish(make_snapshot(0))
        until(lambda: len(rollouts.state().finished) == 3)
        first = next_batch(rollouts, 0)
        assert not first.is_last and first.prompt_ids == (0, 1, 2)
        state = rollouts.state()
        assert {g.prompt.id for _, g in state.finished} == {0, 1, 2} and state.pending == [3], "none is trained yet"
        worker.held.clear()
        last = next_batch(rollouts, 0)
        assert last.is_last and last.prompt_ids == (0, 1, 2, 3) and len(last.groups) == 4
        assert last.metrics["learner/tokens"] < joined([first, last]).metrics["learner/tokens"]
        assert not rollouts.state().finished


def test_a_stop_between_parts_keeps_the_groups_of_those_before() -> None:
    with running(parts_config(0, workers=1, concurrency=4), lambda: Gated([3])) as rollouts:
        rollouts.publish(make_snapshot(0))
        until(lambda: len(rollouts.state().finished) == 3)
        assert not next_batch(rollouts, 0).is_last
        assert rollouts.next_batch(0, lambda: True) is None
        state = rollouts.state()
    with running(parts_config(0, parts=1), FakeWorker, state=state) as rollouts:
        rollouts.publish(make_snapshot(0))
        assert sorted(next_batch(rollouts, 0).prompt_ids) == [0, 1, 2, 3]


def test_a_rewind_between_parts_begins_the_step_anew() -> None:
    with running(parts_config(0, workers=1, concurrency=4), lambda: Gated([3])) as rollouts:
        rollouts.publish(make_snapshot(0))
        until(lambda: len(rollouts.state().finished) == 3)
        assert not next_batch(rollouts, 0).is_last
        rollouts.rewind(RolloutState(100), 0)
        rollouts.publish(make_snapshot(0))
        assert whole_step(rollouts, 0)[0].prompt_ids == (100, 101, 102, 103)


@pytest.mark.parametrize("oversample", [None, 0.5])
@pytest.mark.parametrize("bound", [0, 1, 3])
def test_random_latencies_train_each_prompt_once_and_none_too_late(bound: int, oversample: float | None) -> None:
    rng = random.Random(bound)
    keys: dict[str, Any] = {} if oversample is None else {"stragglers": "oversample", "oversample": oversample}
    cfg, trained, most = parts_config(bound, **keys), list[int](), 0
    with running(cfg, lambda: FakeWorker(lambda: rng.expovariate(300), some_without_signal)) as rollouts:
        rollouts.publish(make_snapshot(0))
        for step in range(40):
            batch, number = whole_step(rollouts, step)
            assert batch.metrics["staleness/max"] <= bound and len(batch.prompt_ids) == 4 and number <= 4
            trained, most = [*trained, *batch.prompt_ids], max(most, number)
            rollouts.publish(make_snapshot(step + 1))
        check_each_prompt_once(trained, rollouts.state())
    assert most > 1


# The loop


class PartRollouts(FakeRollouts):
    """Two parts a step. In step `stops_in` a stop comes after the first."""

    def __init__(self, stops_in: int | None = None) -> None:
        super().__init__()
        self.parts, self._stops_in = 0, stops_in

    def next_batch(self, step: int, stop_requested: Callable[[], bool]) -> TrainBatch | None:
        if self.parts % 2 and step == self._stops_in:
            return None
        self.parts += 1
        if self.parts % 2:
            return TrainBatch((), 1.0, prompt_ids=(self.cursor,), is_last=False)
        return super().next_batch(step, stop_requested)

    def rewind(self, state: RolloutState, version: int) -> None:
        self.parts = 0
        super().rewind(state, version)


class CountingLearner(FakeLearner):
    """Is lost in its `lost_at`-th part."""

    def __init__(self, lost_at: int | None = None) -> None:
        super().__init__()
        self.parts, self._lost_at = 0, lost_at

    def accumulate(self, batch: TrainBatch) -> None:
        self.parts += 1
        if self.parts == self._lost_at:
            raise LearnerLost("the learner is lost")


def test_the_loop_gives_the_learner_every_part(tmp_path: Path) -> None:
    learner = CountingLearner()
    run = make_run(tmp_path, [learner])
    run.rollouts = PartRollouts()
    assert train(run).end == "finished"
    assert learner.parts == learner.version == 5 and not run.is_stepping


def test_a_stop_between_parts_saves_the_step_before(tmp_path: Path) -> None:
    learner = CountingLearner()
    run = make_run(tmp_path, [learner])
    run.rollouts = PartRollouts(stops_in=3)
    assert train(run).end == "stopped"
    assert run.state.step == 3 and learner.saved[-1] == 3 and learner.parts == 4


def test_a_learner_lost_between_parts_is_replaced(tmp_path: Path) -> None:
    replacement = CountingLearner()
    run = make_run(tmp_path, [CountingLearner(lost_at=4), replacement])
    run.rollouts = PartRollouts()
    train_and_export(run)
    assert run.state.step == replacement.version == 5 and replacement.parts >= 3


# The config


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        (["async_rl=false"], "async_rl=true"),
        (["num_mini_batches=2"], "num_mini_batches=1 and ppo_epochs=1"),
        (["ppo_epochs=2"], "num_mini_batches=1 and ppo_epochs=1"),
        (["advantage=reinforce++"], "advantage=grpo or rloo"),
        (["loss_normalization=constant"], "loss_normalization=token or sequence"),
        (["batch_size=3"], "batch_size of at least as many, which is 3"),
    ],
)
def test_what_parts_need(words: list[str], needs: str) -> None:
    with pytest.raises(ConfigError, match=rf"step_parts=4 needs {needs}"):
        load_config("quickstart", ["step_parts=4", *words])
    assert load_config("quickstart", ["step_parts=4"]).step_parts == 4


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], 4),
        (["step_parts=1"], 1),
        (["batch_size=4"], 4),
        (["batch_size=3"], 1),
        (["async_rl=false"], 1),
        (["max_staleness=0"], 1),
        (["num_mini_batches=2"], 1),
        (["ppo_epochs=2"], 1),
        (["advantage=reinforce++"], 1),
        (["loss_normalization=constant"], 1),
        (["loss={_component_: learner.loss.DAPOLoss, clip_high: 0.28}"], 4),
    ],
)
def test_parts_by_default(words: list[str], parts: int) -> None:
    assert step_parts(load_config("quickstart", words)) == parts


def test_a_loss_of_ones_own_gets_whole_steps_unless_asked() -> None:
    """It need not grow in proportion to the weights."""
    cfg = replace(load_config("quickstart"), loss={"_component_": "my_losses.Loss"})
    assert step_parts(cfg) == 1 and step_parts(replace(cfg, step_parts=2)) == 2
