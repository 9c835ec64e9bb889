"""Evaluations while training goes on: on the pool, and in the loop."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_runs import FakeLearner, FakeRollouts, Warnings, make_run
from fakes import FakeWorker, make_group, make_prompt, make_snapshot
from pools import QUICK, config, evaluate, next_batch, running

from tora.config.schema import EvalConfig
from tora.errors import SyncError, WorkerLost
from tora.reporting.evaluation import EvalResult
from tora.run.evaluations import evaluates_behind
from tora.run.loop import train
from tora.types import Group, GroupResult, Prompt, RolloutState


class Slow(FakeWorker):
    """Takes `seconds` for each call of an evaluation."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.evaluated, self.at_once, self.most_at_once = seconds, list[int](), 0, 0

    async def evaluate(self, prompts: Sequence[Prompt], pinned: Any = None) -> list[GroupResult]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(self.seconds)
        self.at_once -= 1
        self.evaluated += [prompt.id for prompt in prompts]
        return await super().evaluate(prompts, pinned)


def train_steps(rollouts: Any, start: int, count: int) -> None:
    for step in range(start, start + count):
        next_batch(rollouts, step)
        rollouts.publish(make_snapshot(step + 1))


def test_training_goes_on_and_the_version_stays() -> None:
    with running(config(1, workers=1), lambda: Slow(0.2)) as rollouts:
        rollouts.publish(make_snapshot(0))
        train_steps(rollouts, 0, 2)
        began = time.perf_counter()
        rollouts.start_evaluation(pinned=True)
        train_steps(rollouts, 2, 5)
        assert rollouts.evaluated(wait=False) is None and time.perf_counter() - began < 0.2, "no step waited for it"
        groups = rollouts.evaluated(wait=True)
        assert groups is not None and [group.version for group in groups] == [2] * 5
        assert [group.prompt.id for group in groups] == list(range(5)), "in the prompts' order"
        assert rollouts.evaluated(wait=True) is None, "once"
        train_steps(rollouts, 7, 2)


def test_the_quick_workers_take_more_of_it() -> None:
    """One of four workers is twenty times slower: its fixed share was what an evaluation waited for."""
    workers = [Slow(2.0), Slow(0.02), Slow(0.02), Slow(0.02)]
    cfg = config(1, workers=4, concurrency=1)
    cfg.rollout.engine, cfg.grpo_samples = "vllm", 1
    with running(cfg, iter(workers).__next__) as rollouts:
        rollouts.publish(make_snapshot(0))
        rollouts.start_evaluation(pinned=True)
        time.sleep(0.5)
        assert len(workers[0].evaluated) == 0 and sum(len(w.evaluated) for w in workers) == 4, "all but its one"
        assert rollouts.evaluated(wait=True) is not None
        assert max(w.most_at_once for w in workers) == 1, "no more than the limit"


def test_it_gets_on_while_groups_take_all_the_room() -> None:
    """One call of each worker has a place of its own."""

    class Busy(FakeWorker):
        async def run_group(self, prompt: Prompt) -> GroupResult:
            await asyncio.sleep(0.02)
            return await super().run_group(prompt)

    with running(config(1, workers=1, concurrency=1), Busy) as rollouts:
        rollouts.publish(make_snapshot(0))
        rollouts.start_evaluation(pinned=True)
        train_steps(rollouts, 0, 3)
        assert rollouts.evaluated(wait=False) is not None


def test_a_lost_worker_gives_its_calls_back() -> None:
    class Dying(FakeWorker):
        async def evaluate(self, prompts: Sequence[Prompt], pinned: Any = None) -> list[GroupResult]:
            raise WorkerLost("killed")

    made = [Dying(), Dying(), FakeWorker(), FakeWorker()]
    with running(config(1), iter(made).__next__, timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        groups = evaluate(rollouts, pinned=True)
        assert groups is not None and [group.rollouts[0].reward for group in groups] == [0, 1, 0, 1, 0]


def test_a_wrong_snapshot_ends_the_run() -> None:
    class Wrong(FakeWorker):
        async def evaluate(self, prompts: Sequence[Prompt], pinned: Any = None) -> list[GroupResult]:
            raise SyncError("half of it")

    with running(config(1), Wrong) as rollouts:
        rollouts.publish(make_snapshot(0))
        with pytest.raises(SyncError, match="half of it"):
            evaluate(rollouts, pinned=True)


def test_a_rewind_gives_it_up() -> None:
    with running(config(1), lambda: Slow(0.1)) as rollouts:
        rollouts.publish(make_snapshot(0))
        train_steps(rollouts, 0, 2)
        rollouts.start_evaluation(pinned=True)
        rollouts.rewind(RolloutState(), 0)
        assert rollouts.evaluated(wait=True) is None
        rollouts.publish(make_snapshot(0))
        groups = evaluate(rollouts, pinned=True)
        assert groups is not None and {group.version for group in groups} == {0}


class Later(FakeRollouts):
    """An evaluation's result is there once it has been asked for `polls` times, or is waited for."""

    def __init__(self, rewards: Sequence[float], polls: int = 2) -> None:
        super().__init__()
        self.rewards, self.polls, self.left, self.running = list(rewards), polls, 0, False

    def start_evaluation(self, *, pinned: bool) -> None:
        assert pinned and not self.running, "one at a time"
        self.running, self.left = True, self.polls
        self.events.append("evaluate")

    def evaluated(self, *, wait: bool) -> list[Group] | None:
        self.left -= 1
        if not wait and self.left > 0:
            return None
        self.running = False
        return [make_group(make_prompt(0), [self.rewards.pop(0)])]


class Rows(Warnings):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, float]] = []

    def evaluation(self, step: int, result: EvalResult) -> None:
        self.rows.append((step, result.reward))


class Exporting(FakeLearner):
    def export(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "policy").write_text(str(self.version))


def make(folder: Path, rollouts: Later, **keys: Any):
    run = make_run(folder, [Exporting()], eval_sets={"": 1})
    run.cfg = replace(run.cfg, async_rl=True, eval=EvalConfig(dataset={}, **keys))
    run.rollouts, run.log = rollouts, Rows()
    return run


def test_each_result_belongs_to_the_step_it_began_with(tmp_path: Path) -> None:
    run = make(tmp_path, Later([0.1, 0.5, 0.4, 0.3]), every=2, keep_best=True)
    outcome = train(run)
    assert isinstance(run.log, Rows) and run.log.rows == [(0, 0.1), (2, 0.5), (4, 0.4), (5, 0.3)]
    assert (outcome.before, outcome.after, outcome.after_step) == (
        EvalResult(0.1, 1, length=4.0, sample=outcome.before and outcome.before.sample),
        EvalResult(0.3, 1, length=4.0, sample=outcome.after and outcome.after.sample),
        5,
    )
    assert (tmp_path / "best/policy").read_text() == "2", "not that of the learner when the result arrived"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["best", "checkpoints"]


def test_the_next_waits_for_the_last_and_the_last_step_for_its_own(tmp_path: Path) -> None:
    run = make(tmp_path, Later([(step + 1) / 8 for step in range(6)], polls=100), every=1)
    outcome = train(run)
    assert isinstance(run.log, Rows) and run.log.rows == [(step, (step + 1) / 8) for step in range(6)]
    assert outcome.after_step == 5


def test_an_early_stop_evaluates_the_policy_it_ends_with(tmp_path: Path) -> None:
    run = make(tmp_path, Later([0.5, 0.4, 0.3], polls=1), every=2, early_stop=1)
    outcome = train(run)
    assert (outcome.end, run.state.step, outcome.after_step) == ("early", 3, 3)
    assert isinstance(run.log, Rows) and run.log.rows == [(0, 0.5), (2, 0.4), (3, 0.3)]


def test_a_stopped_run_has_no_result_of_what_it_cut_short(tmp_path: Path) -> None:
    run = make(tmp_path, Later([0.5, 0.4], polls=9), every=2)
    run.stop_requested = lambda: run.state.step == 3
    outcome = train(run)
    assert isinstance(run.log, Rows) and (outcome.end, outcome.after, run.log.rows) == ("stopped", None, [(0, 0.5)])


def test_a_run_without_a_step_left_still_reports(tmp_path: Path) -> None:
    run = make(tmp_path, Later([0.5], polls=9))
    run.state.step = run.cfg.num_steps
    assert train(run).before is not None


@pytest.mark.parametrize(
    ("run_keys", "model_keys", "behind"),
    [
        ({}, {}, True),
        ({"async_rl": False}, {}, False),
        ({"eval": EvalConfig(dataset={}, blocking=True)}, {}, False),
        ({"eval": None}, {}, False),
        ({}, {"lora_type": "full"}, False),
        ({}, {"train_vision": "full"}, False),
    ],
)
def test_which_runs_train_on(run_keys: dict[str, Any], model_keys: dict[str, Any], behind: bool) -> None:
    cfg = config(1)
    assert evaluates_behind(replace(cfg, model=replace(cfg.model, **model_keys), **run_keys)) is behind
