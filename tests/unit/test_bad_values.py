"""A step with a loss or gradient that is not finite changes nothing, and says why."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from learners import config, make_batch, make_groups, weights
from planted import with_bad_logprob
from safetensors.torch import load_file
from tiny import make_text_model

from learner.learner import Learner
from tora.adapters.inject import snapshot
from tora.errors import TrainingError
from tora.types import TrainBatch

LOSS = {"_component_": "planted.PlantedLoss", "kl_coeff": 0.05}
NEVER = {**LOSS, "first": 1_000_000}
METHODS = [
    ("full", False, 1, "fp32"),
    ("full", False, 1, "bf16"),
    ("lora", False, 1, "bf16"),
    ("dora", False, 2, "bf16"),
    ("dora_cache", False, 1, "fp32"),
    ("dora_cache", True, 1, "bf16"),
]
"""Method, whether its base is in NF4, passes over a batch, and dtype."""
SMALL = 60
"""Tokens of a micro-batch, of which a batch then has several."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"), "qwen2")


def state(learner: Learner, scratch: Path) -> dict[str, torch.Tensor]:
    """Everything that a step may change but the version and the schedule."""
    learner.save(scratch)
    saved = {**load_file(scratch / "weights.safetensors"), **load_file(scratch / "optimizer.safetensors")}
    return {**saved, **{name: buffer.clone() for name, buffer in learner.model.named_buffers()}}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def batch(seed: int) -> TrainBatch:
    made = make_batch(make_groups(seed=seed), SMALL)
    assert len(made.micro_batches) > 1
    return TrainBatch(made.micro_batches, 1.0, prompt_ids=(70, 71, 72))


@pytest.mark.parametrize(("lora_type", "quantize_base", "ppo_epochs", "dtype"), METHODS)
def test_a_bad_step_leaves_everything_as_an_empty_batch_does(
    folder: Path, tmp_path: Path, lora_type: str, quantize_base: bool, ppo_epochs: int, dtype: str
) -> None:
    """Nor does anything of it remain in the gradients: the next step is the same, bit for bit."""
    cfg = config(folder, lora_type, quantize_base=quantize_base, loss=NEVER, ppo_epochs=ppo_epochs, dtype=dtype)
    learner, other = Learner(cfg), Learner(cfg)
    for each in (learner, other):
        each.step(batch(0))
    before, sent = state(learner, tmp_path), snapshot(learner.model, 1)
    result = learner.step(with_bad_logprob(batch(1)))
    assert result.version == 2 and result.metrics["learner/bad_step"] == 1
    assert_same(before, state(learner, tmp_path))
    assert snapshot(learner.model, 1).sha256 == sent.sha256
    assert all(parameter.grad is None for parameter in learner.model.parameters())
    other.step(TrainBatch((), 1.0))
    assert learner.step(batch(2)) == other.step(batch(2))
    assert_same(state(learner, tmp_path), state(other, tmp_path))


@pytest.mark.parametrize("plant", ["loss", "gradient"])
@pytest.mark.parametrize("clip", [1.0, None])
def test_a_bad_loss_and_a_bad_gradient_are_each_enough(
    folder: Path, tmp_path: Path, plant: str, clip: float | None
) -> None:
    learner = Learner(config(folder, loss={**LOSS, "plant": plant}, clip_grad_norm=clip))
    before = state(learner, tmp_path)
    result = learner.step(batch(0))
    named = {"loss": "loss is nan", "gradient": "gradient norm is nan"}[plant]
    assert result.bad == f"{named}; every log-prob and advantage is finite"
    assert_same(before, state(learner, tmp_path))
    assert learner.step(batch(1)).bad == ""


def test_a_bad_later_update_ends_the_step_and_leaves_the_earlier_ones(folder: Path) -> None:
    count = len(batch(0).micro_batches)
    planted = {**LOSS, "first": count, "last": count}  # in the first micro-batch of the second pass
    learner = Learner(config(folder, loss=planted, ppo_epochs=3))
    single = Learner(config(folder, loss=NEVER, ppo_epochs=1))
    result = learner.step(batch(0))
    assert result.bad.startswith("loss is nan in update 2 of 3; ") and result.metrics["learner/bad_step"] == 1
    assert single.step(batch(0)).metrics["learner/bad_step"] == 0
    for name, tensor in weights(single).items():
        torch.testing.assert_close(weights(learner)[name], tensor)


def test_the_prompts_behind_a_bad_step_are_named(folder: Path) -> None:
    bad = with_bad_logprob(batch(0))
    group = int(bad.micro_batches[-1].groups_B[0])
    result = Learner(config(folder, loss=NEVER)).step(bad)
    assert result.bad == (
        f"loss is nan and gradient norm is nan; not finite are the actor's log-probs of prompt {70 + group}"
    )
    learner = Learner(config(folder, "full", loss=NEVER))
    with torch.no_grad():
        learner.model.tok_embeddings.weight.fill_(math.nan)
    result = learner.step(batch(0))
    assert result.bad.endswith("; not finite are the learner's log-probs of prompts 70, 71, 72")


def test_kl_in_the_reward_makes_a_bad_value_a_bad_step_too(folder: Path, tmp_path: Path) -> None:
    learner = Learner(config(folder, loss={**NEVER, "kl_in": "reward"}))
    before = state(learner, tmp_path)
    bad = with_bad_logprob(batch(0))
    result = learner.step(bad)
    assert "the actor's log-probs of prompt 7" in result.bad and "the advantages of prompt 7" in result.bad
    assert_same(before, state(learner, tmp_path))


def test_an_optimizer_that_makes_bad_weights_ends_the_run(folder: Path) -> None:
    """A's gradient is zero while B is, and without eps Adam divides zero by zero."""
    without_eps = {"_component_": "torch.optim.AdamW", "lr": 1e-3, "eps": 0.0}
    learner = Learner(config(folder, "lora", loss=NEVER, optimizer=without_eps))
    with pytest.raises(TrainingError, match=r"weights that are not finite, .* to policy version 1; "):
        learner.step(batch(0))


def test_a_batch_whose_tokens_all_weigh_nothing_has_no_bad_values(folder: Path) -> None:
    learner = Learner(config(folder, loss=NEVER))
    made = batch(0)
    for micro in made.micro_batches:
        micro.weights_N[:] = 0
    result = learner.step(made)
    assert result.bad == "" and all(math.isfinite(value) for value in result.metrics.values())
