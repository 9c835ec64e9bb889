"""A step whose groups come in parts: the learner's update is that of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparisons import compare, compare_metrics
from learners import SETTINGS, config, in_parts, make_groups, weights
from tiny import make_text_model, make_vl_model
from vision_learners import vision_groups, vl_config

from learner.learner import Learner
from tora.batching.batch import micro_batches, token_weights
from tora.config.schema import RunConfig
from tora.distributed.sharding import full_tensor
from tora.types import Group, StepResult, StopReason, TrainBatch

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
