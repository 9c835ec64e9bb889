"""A step whose groups come in parts: the learner's update is that of the whole, and the pool gives each group once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparisons import compare, compare_metrics
from fake_runs import FakeLearner, FakeRollouts, make_run
from fakes import FakeWorker, make_group, make_prompt, make_snapshot
from learners import SETTINGS, config, in_parts, make_groups, weights
from pools import check_each_prompt_once, next_batch, running, some_without_signal
from pools import config as pool_config
from tiny import make_text_model, make_vl_model
from vision_learners import vision_groups, vl_config

from learner.learner import Learner
from tora.batching.batch import micro_batches, token_weights
from tora.batching.train_batch import joined, make_batch, make_part
from tora.config.load import load_config
from tora.config.schema import RunConfig
from tora.distributed.sharding import full_tensor
from tora.errors import ConfigError, LearnerLost
from tora.run.loop import train
from tora.run.recovery import train_and_export
from tora.types import Group, Prompt, RolloutState, StepResult, StopReason, TrainBatch

SMOOTH = {"_component_": "torch.optim.AdamW", "lr": 1e-3, "eps": 1e-4}
"""With its default eps, Adam would turn a gradient of pure rounding noise into a whole step."""
GRPO = "learner.loss.GRPOLoss"
KL = {"_component_": GRPO, "kl_coeff": 0.05, "entropy_coeff": 0.02}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def vl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vl_model(tmp_path_factory.mktemp("vl"))


def whole(groups: Sequence[Group], capacity: int = 60, **changes: Any) -> list[TrainBatch]:
    ids = tuple(group.prompt.id for group in groups)
    return [TrainBatch(micro_batches(groups, capacity=capacity, **{**SETTINGS, **changes}), 1.0, prompt_ids=ids)]


def train_on(cfg: RunConfig, steps: Sequence[Sequence[TrainBatch]]) -> tuple[list[StepResult], Learner]:
    learner = Learner(replace(cfg, step_parts=4) if len(steps[0]) > 1 else cfg)
    results = []
    for *parts, last in steps:
        for part in parts:
            learner.accumulate(part)
        results.append(learner.step(last))
    return results, learner


def truncated(groups: Sequence[Group]) -> list[Group]:
    """Every third rollout of each group was cut off."""
    return [
        replace(
            group,
            rollouts=tuple(
                replace(r, stop_reason=StopReason.LENGTH) if i % 3 == 0 else r for i, r in enumerate(group.rollouts)
            ),
        )
        for group in groups
    ]


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("lora", {}, {}),
    ("full", {"loss": KL}, {"regularizer": "loss"}),
    ("dora_cache", {"loss": KL}, {"regularizer": "loss", "normalization": "sequence", "share_prefix": True}),
    ("lora", {"loss": {**KL, "kl_in": "reward"}}, {"regularizer": "reward", "mask_truncated": True}),
    ("dora", {"advantage": "rloo"}, {"advantage": "rloo", "normalize_advantages": False, "mask_truncated": True}),
    ("lora", {"clip_grad_norm": None, "loss": {"_component_": "learner.loss.GSPOLoss"}}, {"normalization": "sequence"}),
    (
        "lora",
        {"clip_grad_norm": 1e-3, "loss": {"_component_": GRPO, "proximal": "actor", "importance_correction": "none"}},
        {},
    ),
]


@pytest.mark.parametrize(("lora_type", "keys", "settings"), CASES)
def test_parts_make_the_update_of_the_whole(
    folder: Path, lora_type: str, keys: dict[str, Any], settings: dict[str, Any]
) -> None:
    """The whole step's numbers are held against transformers and float64 formulas elsewhere."""
    cfg = config(folder, lora_type, optimizer=SMOOTH, **keys)
    steps = [truncated(make_groups(5, seed=seed)) for seed in range(3)]
    results, learner = train_on(
        cfg, [in_parts(g, cuts, **settings) for g, cuts in zip(steps, ([2], [1, 2], [1, 4]), strict=True)]
    )
    expected, reference = train_on(cfg, [whole(groups, **settings) for groups in steps])
    for found, wanted in zip(results, expected, strict=True):
        assert found.version == wanted.version and found.bad == wanted.bad == ""
        compare_metrics(found.metrics, wanted.metrics)
    assert any(
        not torch.equal(p, q) for p, q in zip(weights(learner).values(), weights(Learner(cfg)).values(), strict=True)
    )
    compare(weights(learner), weights(reference))


@pytest.mark.parametrize("train_vision", ["none", "lora"])
def test_parts_with_images(vl_folder: Path, train_vision: str) -> None:
    cfg = vl_config(vl_folder, "lora", train_vision, optimizer=SMOOTH)
    groups = vision_groups(vl_folder)
    results, learner = train_on(cfg, [in_parts(groups, [1, 3])])
    expected, reference = train_on(cfg, [whole(groups)])
    compare_metrics(results[0].metrics, expected[0].metrics)
    compare(weights(learner), weights(reference))


@pytest.mark.parametrize("lora_type", ["full", "lora", "dora_cache"])
def test_in_bf16_parts_cost_no_more_than_bf16(folder: Path, lora_type: str) -> None:
    cfg = config(folder, lora_type, optimizer={"_component_": "torch.optim.SGD", "lr": 1.0}, clip_grad_norm=None)
    groups = make_groups(5)

    def flat(learner: Learner) -> torch.Tensor:
        return torch.cat([full_tensor(p).flatten().float() for p in weights(learner).values()])

    start = flat(Learner(cfg))

    def change(cfg: RunConfig, batches: Sequence[TrainBatch]) -> torch.Tensor:
        return flat(train_on(cfg, [batches])[1]) - start

    exact = change(cfg, whole(groups))
    bf16 = replace(cfg, dtype="bf16")
    alike, found = change(bf16, whole(groups)), change(bf16, in_parts(groups, [1, 3]))
    assert exact.norm() > 0
    assert 0 < (found - exact).norm() < 1.3 * (alike - exact).norm()


def test_dropout_draws_for_each_pass_of_a_step_and_repeats_with_the_seed(folder: Path) -> None:
    """With dropout the ratios are to the policy without it, which must have been asked for each part."""
    cfg = config(folder, optimizer=SMOOTH, model={"lora_dropout": 0.3})
    groups = make_groups(4)
    runs = [train_on(cfg, [in_parts(groups, [1, 2]), in_parts(groups, [3])])[0] for _ in range(2)]
    assert runs[0] == runs[1]
    without, _ = train_on(replace(cfg, model=replace(cfg.model, lora_dropout=0.0)), [in_parts(groups, [1, 2])])
    assert runs[0][0].metrics["mismatch_kl"] == pytest.approx(without[0].metrics["mismatch_kl"], rel=1e-5)
    assert runs[0][1].metrics["learner/grad_norm"] != pytest.approx(without[0].metrics["learner/grad_norm"], rel=1e-3)


def level(groups: Sequence[Group]) -> list[Group]:
    return [replace(g, rollouts=tuple(replace(r, reward=1.0) for r in g.rollouts)) for g in groups]


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_part_without_a_signal_adds_nothing(folder: Path, empty: int) -> None:
    cfg, groups = config(folder, optimizer=SMOOTH), make_groups(6)
    groups[2 * empty : 2 * empty + 2] = level(groups[2 * empty : 2 * empty + 2])
    batches = in_parts(groups, [2, 4])
    assert [bool(batch.micro_batches) for batch in batches] == [i != empty for i in range(3)]
    results, learner = train_on(cfg, [batches])
    expected, reference = train_on(cfg, [whole(groups)])
    compare_metrics(results[0].metrics, expected[0].metrics)
    compare(weights(learner), weights(reference))


def test_a_step_without_any_signal_advances_the_version_alone(folder: Path) -> None:
    cfg = config(folder)
    (result,), learner = train_on(cfg, [in_parts(level(make_groups(4)), [2])])
    assert result.version == 1 and result.metrics["learner/updates"] == 0
    compare(weights(learner), weights(Learner(cfg)), atol=0)


@pytest.mark.parametrize("number", [0, 3])
def test_a_bad_value_in_a_part_leaves_the_step_out_and_is_named(folder: Path, number: int) -> None:
    cfg, groups = config(folder, optimizer=SMOOTH), make_groups(4)
    first, *others = groups[number].rollouts
    bad = replace(first, actor_logprobs=np.full_like(first.actor_logprobs, np.nan))
    groups[number] = replace(groups[number], rollouts=(bad, *others))
    results, learner = train_on(cfg, [in_parts(groups, [2]), in_parts(make_groups(4, seed=1), [2])])
    assert f"prompt {number}" in results[0].bad and results[0].metrics["learner/updates"] == 0
    assert results[1].bad == ""
    good = train_on(cfg, [in_parts(level(groups), [2]), in_parts(make_groups(4, seed=1), [2])])[1]
    compare(weights(learner), weights(good), atol=1e-6)


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_weights_of_parts_are_those_of_the_whole_up_to_one_factor(normalization: Any) -> None:
    lengths = [3, 5, 8, 1]
    found = [w for part in (lengths[:1], lengths[1:]) for w in token_weights(part, normalization, 20, 7, is_part=True)]
    total = sum(w * n for w, n in zip(found, lengths, strict=True))
    assert [w / total for w in found] == pytest.approx(token_weights(lengths, normalization, 20))


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
        import asyncio

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
