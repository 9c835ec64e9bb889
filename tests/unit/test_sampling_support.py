"""Penalised and truncated sampling: ratio 1 for equal policies, and every correction trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import shake
from distributions import SETTINGS, expected
from fakes import make_prompt, make_rollout
from learners import config, make_batch
from tiny import make_text_model

from actors.torch_engine.engine import TorchEngine
from learner.learner import Learner
from tora.config.schema import RunConfig
from tora.types import Completion, Group, Rollout, SampleRequest, Sampling, TrainBatch

PROMPTS = [tuple(range(20, 32)), (7, 7, 7, 40), tuple(range(100, 130))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"))


def sample(learner: Learner, sampling: Sampling) -> list[list[Completion]]:
    engine = TorchEngine(learner.model, device=learner.device, shared=True, max_rows=100)
    engine.install(learner.snapshot())
    return engine.generate([SampleRequest(ids, 4, seed, sampling) for seed, ids in enumerate(PROMPTS)])


def groups_of(completions: list[list[Completion]]) -> list[Group]:
    return [
        Group(replace(make_prompt(i), token_ids=ids), tuple(rollout(c, float(g % 2)) for g, c in enumerate(group)))
        for i, (ids, group) in enumerate(zip(PROMPTS, completions, strict=True))
    ]


def rollout(completion: Completion, reward: float) -> Rollout:
    made = make_rollout(completion.token_ids, reward)
    return replace(made, actor_logprobs=completion.logprobs, versions=completion.versions)


def sampled_step(cfg: RunConfig, setting: str) -> tuple[Learner, TrainBatch]:
    learner = Learner(cfg, shares_model=True)
    shake(learner.model)
    sampling = Sampling(8, **SETTINGS[setting])
    return learner, make_batch(groups_of(sample(learner, sampling)), temperature=sampling.temperature)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_torch_engine_reports_both_distributions(folder: Path, setting: str) -> None:
    learner = Learner(config(folder), shares_model=True)
    sampling = Sampling(8, **SETTINGS[setting])
    for ids, group in zip(PROMPTS, sample(learner, sampling), strict=True):
        for c in group:
            whole = [*ids, *c.token_ids.tolist()]
            with torch.no_grad():
                logits = learner_logits(learner, whole)[len(ids) - 1 : -1]
            policy, drawn = expected(logits, whole, len(ids), sampling)
            np.testing.assert_allclose(c.logprobs, policy, atol=2e-5)
            np.testing.assert_allclose(c.sampling_logprobs, drawn, atol=2e-5)


def learner_logits(learner: Learner, ids: list[int]) -> torch.Tensor:
    from decoders import packed_logits

    return packed_logits(learner.model, [torch.tensor(ids)])


@pytest.mark.parametrize("setting", SETTINGS)
def test_equal_policies_have_ratio_one(folder: Path, setting: str) -> None:
    learner, batch = sampled_step(config(folder), setting)
    metrics = learner.step(batch).metrics
    assert abs(metrics["mismatch_max_ratio"] - 1) < 1e-4
    assert metrics["mismatch_kl"] < 1e-6
    assert metrics["importance/cut_share"] == 0


@pytest.mark.parametrize("setting", ["top_p", "all"])
@pytest.mark.parametrize(
    "loss",
    [
        {"importance_correction": "token_tis"},
        {"importance_correction": "token_mask"},
        {"importance_correction": "sequence_mask"},
        {"importance_correction": "none"},
        {"importance_correction": "none", "proximal": "actor"},
    ],
    ids=lambda loss: "-".join(loss.values()),
)
def test_every_correction_trains_as_without_one(folder: Path, setting: str, loss: dict[str, Any]) -> None:
    norms = []
    for changes in (loss, {"importance_correction": "none"}):
        cfg = config(folder, loss={"_component_": "learner.loss.GRPOLoss", **changes})
        learner, batch = sampled_step(cfg, setting)
        norms.append(learner.step(batch).metrics["learner/grad_norm"])
    assert norms[0] > 0 and norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("setting", ["top_p", "all"])
def test_kl_in_the_reward_is_zero_for_equal_policies(folder: Path, setting: str) -> None:
    loss = {"_component_": "learner.loss.GRPOLoss", "kl_coeff": 0.1, "kl_in": "reward"}
    cfg = config(folder, loss=loss)
    learner = Learner(cfg, shares_model=True)  # the adapter starts as the base, which is the reference
    sampling = Sampling(8, **SETTINGS[setting])
    batch = make_batch(groups_of(sample(learner, sampling)), temperature=sampling.temperature)
    assert abs(learner.step(batch).metrics["kl/mean"]) < 1e-6
