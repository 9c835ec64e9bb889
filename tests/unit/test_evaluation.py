"""Held-out scores, and what a run does with them: best policy, early stop, several sets, steps that train nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_runs import FakeLearner, FakeRollouts, Warnings, make_run, names
from fakes import make_group, make_prompt

from tora.config.load import load_config
from tora.config.schema import EvalConfig
from tora.errors import ConfigError
from tora.reporting.evaluation import (
    EvalResult,
    interval,
    mean_pass_at,
    pass_at_k,
    passes_by,
    summarize,
    summarize_sets,
)
from tora.rewards.accuracy import accuracy_reward
from tora.run.best import is_best
from tora.run.checkpoints import RunState
from tora.run.loop import train
from tora.run.recovery import train_and_export
from tora.tasks.prompts import RunPrompts
from tora.types import Group, TrainBatch


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 3), (5, 0, 5), (5, 5, 1), (6, 3, 4), (1, 1, 1), (4, 3, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n: int, c: int, k: int) -> None:
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_has_no_bias_and_does_not_overflow() -> None:
    p, n, k, rng = 0.3, 8, 4, np.random.default_rng(0)
    estimates = [pass_at_k(n, int(c), k) for c in rng.binomial(n, p, size=20_000)]
    assert np.mean(estimates) == pytest.approx(1 - (1 - p) ** k, abs=4 * np.std(estimates) / math.sqrt(20_000))
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)
    assert mean_pass_at([], 4) == {1: 0.0, 2: 0.0, 4: 0.0}
    assert list(mean_pass_at([3], 6)) == [1, 2, 4, 6]


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = [low <= 0.3 <= high for low, high in (interval(rng.random(200) < 0.3) for _ in range(200))]
    assert 0.90 <= np.mean(hits) <= 0.99
    assert interval([0.5]) == (0.5, 0.5) and all(map(math.isnan, interval([])))


def test_a_set_is_scored_by_rollouts_and_those_left_out_count_as_zero() -> None:
    groups = [make_group(make_prompt(0), [1.0, 0.0]), make_group(make_prompt(1), [1.0])]
    result = summarize(groups, 2, passes_by("fake"))
    assert (result.reward, result.accuracy, result.num_prompts) == (0.5, 0.5, 2)
    assert result.pass_at == {1: 0.5, 2: 1.0} and result.length == pytest.approx((4 + 5 + 4) / 3)
    assert summarize(groups, 2, None).accuracy is None and summarize(groups, 2, None).pass_at == {}
    assert summarize([], 1, passes_by("fake")).reward == 0
    first, second = summarize_sets(groups, {"": 1, "hard": 1}, 2, None)
    assert (first.name, first.reward, second.name, second.reward) == ("", 0.5, "hard", 0.5)


@pytest.mark.parametrize(
    ("rewards", "name"),
    [
        (["tora.rewards.format", "tora.rewards.math_answer"], "math_answer"),
        (["mine.score", "tora.rewards.format"], None),
        (["mine.score", {"_component_": "mine.right", "accuracy": True, "name": "ok"}], "ok"),
        ([{"_component_": "tora.rewards.answer_tag", "accuracy": False}], None),
        (["tora.rewards.functions.answer_tag"], "answer_tag"),
        (["mytora.rewards.answer_tag"], None),
    ],
)
def test_accuracy_is_what_a_reward_declares(rewards: list, name: str | None) -> None:
    components = [reward if isinstance(reward, dict) else {"_component_": reward} for reward in rewards]
    assert accuracy_reward(components) == name


def test_an_accuracy_that_is_no_boolean_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rewards\.0\.accuracy=\"maybe\" must be true or false"):
        load_config("quickstart", ["rewards.0.accuracy=maybe"])
    with pytest.raises(ConfigError, match=r"eval\.more\.hard=3 must hold _component_"):
        load_config("quickstart", ["eval.more.hard=3"])


def test_a_reward_that_is_not_finite_is_never_the_best() -> None:
    state = RunState()
    results = [EvalResult(reward=value, num_prompts=1) for value in (math.nan, -1.0, -1.0, math.inf, 0.5)]
    assert [is_best(state, result) for result in results] == [False, True, False, False, True]
    assert (state.best_reward, state.evals_since_best) == (0.5, 0)


class Evaluated(FakeRollouts):
    """Its held-out reward is the next of `rewards`; a step has no micro-batches if its number is in `idle`."""

    def __init__(self, rewards: list[float], idle: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.rewards, self.idle, self.steps = list(rewards), idle, 0

    def start_evaluation(self, *, pinned: bool) -> None:
        assert not pinned

    def evaluated(self, *, wait: bool) -> list[Group]:
        assert wait
        return [make_group(make_prompt(0), [self.rewards.pop(0)])]

    def next_batch(self, step: int, stop_requested: object) -> TrainBatch:
        self.steps += 1
        return TrainBatch(() if step in self.idle else (SimpleNamespace(),), 1.0, {"reward/mean": 1.0}, (1, 2))


class Exporting(FakeLearner):
    def __init__(self) -> None:
        super().__init__()
        self.exported: list[tuple[str, int]] = []

    def export(self, folder: Path) -> None:
        self.exported.append((folder.name, self.version))


def make(folder: Path, rollouts: FakeRollouts, learner: FakeLearner | None = None, **eval_keys: object):
    run = make_run(folder, [learner or FakeLearner()], eval_sets={"": 1})
    evaluated = EvalConfig(dataset={}, every=1, **eval_keys) if eval_keys else None
    run.cfg = replace(run.cfg, eval=evaluated, max_idle_steps=2)
    run.rollouts = rollouts
    return run


def test_the_best_policy_is_kept_and_an_early_stop_ends_the_run(tmp_path: Path) -> None:
    learner = Exporting()
    run = make(tmp_path, Evaluated([0.1, 0.5, 0.5, 0.4, 0.9]), learner, keep_best=True, early_stop=2)
    outcome = train_and_export(run)
    assert learner.exported == [("best", 0), ("best", 1), ("adapter", 3)]
    assert (outcome.end, run.state.step, outcome.after_step) == ("early", 3, 3)
    assert names(tmp_path)[-1] == "step_000003", "it is saved"
    state = run.checkpoints.read(tmp_path / "checkpoints/step_000003", make_prompt)
    assert (state.best_reward, state.evals_since_best) == (0.5, 2)


def test_the_first_evaluation_can_be_left_out(tmp_path: Path) -> None:
    outcome = train(make(tmp_path, Evaluated([0.1, 0.2, 0.3, 0.4, 0.5]), at_start=False))
    assert outcome.before is None and outcome.after is not None and outcome.after.reward == 0.5


def test_a_stopped_run_reports_no_score_that_it_did_not_measure(tmp_path: Path) -> None:
    """It reported the score from before its first step as its result."""
    run = make(tmp_path, Evaluated([0.1]), at_start=True)
    run.stop_requested = lambda: run.state.step == 1
    outcome = train(run)
    assert (outcome.end, outcome.after) == ("stopped", None)
    assert outcome.before is not None and outcome.before.reward == pytest.approx(0.1)


def test_a_resumed_run_knows_the_step_of_its_first_score(tmp_path: Path) -> None:
    run = make(tmp_path, Evaluated([0.2, 0.3, 0.4]), at_start=True)
    run.state.step = 3
    outcome = train(run)
    assert outcome.before is not None and outcome.before.reward == pytest.approx(0.2)
    assert (outcome.before_step, outcome.after_step) == (3, 5)


def test_steps_that_train_nothing_are_said_once_in_a_row_and_end_the_run(tmp_path: Path) -> None:
    run = make(tmp_path, Evaluated([], idle=(0, 2, 3)))
    run.log = Warnings()
    outcome = train(run)
    assert run.log.sentences == [
        f"step {number} trained nothing: none of its 2 groups has rewards that differ (mean reward 1)"
        for number in (1, 3)
    ]
    assert (outcome.end, run.state.step, names(tmp_path)[-1]) == ("idle", 4, "step_000004")
    assert outcome.reason.startswith("2 steps in a row trained nothing") and not outcome.all_idle
    run = make(tmp_path / "never", Evaluated([], idle=(0, 1, 2, 3, 4)))
    run.cfg = replace(run.cfg, max_idle_steps=0)
    outcome = train(run)
    assert (outcome.end, outcome.all_idle) == ("finished", True)


def test_several_sets_have_prompts_of_their_own() -> None:
    more = "{math: {_component_: tora.tasks.chain_sum.chain_sum, split: test}}"
    prompts = RunPrompts(load_config("quickstart", [f"eval.more={more}", "eval.num_prompts=3"]))
    assert prompts.eval_sets == {"": 3, "math": 3}
    assert len({prompt.id for prompt in prompts.held_out}) == 6
    assert [p.source for p in prompts.held_out[:3]] == [p.source for p in prompts.held_out[3:]]
