"""Checkpoints of any torch optimizer, on one rank. `tests/integration/test_optimizer_ranks.py` has several."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import config, make_batch, make_groups, weights
from tiny import make_text_model

from learner.learner import Learner
from tora.distributed.process_group import leave
from tora.errors import ConfigError

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"_component_": "torch.optim.AdamW", "lr": 1e-3, "amsgrad": True},
    "adafactor": {"_component_": "torch.optim.Adafactor", "lr": 1e-2},
    "sgd": {"_component_": "torch.optim.SGD", "lr": 1e-2},
    "momentum": {"_component_": "torch.optim.SGD", "lr": 1e-2, "momentum": 0.9, "nesterov": True},
    "muon": {"_component_": "torch.optim.Muon", "lr": 1e-3},
    "nadam": {"_component_": "torch.optim.NAdam", "lr": 1e-3},
    "asgd": {"_component_": "torch.optim.ASGD", "lr": 1e-2},
    "adamw8bit": {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3, "block_size": 64},
    "adamw4bit": {"_component_": "torchao.optim.AdamW4bit", "lr": 1e-3},
    "adamwfp8": {"_component_": "torchao.optim.AdamWFp8", "lr": 1e-3},
}
LOW_BIT = ["adamw8bit", "adamw4bit", "adamwfp8"]
"""Quantises the state of weights with at least 4096 elements, which no adapter here has."""
STEP_LR = {"_component_": "torch.optim.lr_scheduler.StepLR", "step_size": 2, "gamma": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def eager():
    """torchao compiles its step, which takes longer than all of these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield
    leave()


def learner(folder: Path, optimizer: dict[str, Any], **changes: Any) -> Learner:
    return Learner(config(folder, changes.pop("lora_type", "lora"), optimizer=optimizer, **changes))


def batch(seed: int):
    return make_batch(make_groups(seed=seed))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in OPTIMIZERS),
        *((name, {"lora_type": "full"}) for name in LOW_BIT),
        *((name, {"lora_type": "full", "dtype": "bf16"}) for name in ("adamw8bit", "momentum")),
    ],
)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    folder: Path, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    unbroken = learner(folder, OPTIMIZERS[name], **changes)
    for seed in range(2):
        unbroken.step(batch(seed))
    unbroken.save(tmp_path)
    resumed = learner(folder, OPTIMIZERS[name], **changes)
    resumed.restore(tmp_path)
    for seed in range(2, 4):
        assert unbroken.step(batch(seed)) == resumed.step(batch(seed))
    theirs = weights(resumed)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in weights(unbroken).items())


@pytest.mark.parametrize("name", LOW_BIT)
def test_low_bit_state_is_saved_as_it_is(folder: Path, tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file

    trained = learner(folder, OPTIMIZERS[name], lora_type="full")
    trained.step(batch(0))
    trained.save(tmp_path)
    dtypes = {tensor.dtype for key, tensor in load_file(tmp_path / "optimizer.safetensors").items() if ":codes" in key}
    assert dtypes == {torch.float8_e4m3fn if name == "adamwfp8" else torch.uint8}


def test_a_parameter_without_a_gradient_has_no_state(folder: Path, tmp_path: Path) -> None:
    never = learner(folder, OPTIMIZERS["adamw"])
    never.save(tmp_path)
    resumed = learner(folder, OPTIMIZERS["adamw"])
    resumed.restore(tmp_path)
    assert resumed.step(batch(0)) == never.step(batch(0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"optimizer": OPTIMIZERS["momentum"]},
            "SGD cannot continue from checkpoint .*, written with torch.optim.AdamW",
        ),
        (
            {"optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3}},
            "it keeps .* and the checkpoint has .*max_exp",
        ),
        ({"lora_type": "dora"}, "different parameters"),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    trained = learner(folder, OPTIMIZERS["adamw"])
    trained.step(batch(0))
    trained.save(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        learner(folder, **{"optimizer": OPTIMIZERS["adamw"], **changes}).restore(tmp_path)


def test_a_checkpoint_of_another_rank_is_refused_before_anything_changes(folder: Path, tmp_path: Path) -> None:
    cfg = config(folder, optimizer=OPTIMIZERS["adamw"])
    cfg.model.lora_rank = 1
    Learner(cfg).save(tmp_path)
    wider = learner(folder, OPTIMIZERS["adamw"])
    before = weights(wider)
    with pytest.raises(ConfigError, match=r"has .*lora_a.* in the shape \(1, .*this run trains it in \(4, "):
        wider.restore(tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(wider).items())


def lrs(trained: Learner, seeds: range) -> list[float]:
    return [trained.step(batch(seed)).metrics["learner/lr"] for seed in seeds]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("changes", [{}, {"num_steps": 5}, {"lr_scheduler": STEP_LR}])
def test_a_changed_learning_rate_applies_as_if_it_had_been_so_from_the_start(
    folder: Path, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    started = learner(folder, OPTIMIZERS[name])
    lrs(started, range(2))
    started.save(tmp_path)
    cfg = config(folder, optimizer={**OPTIMIZERS[name], "lr": 5e-4})
    resumed, always = (Learner(dataclasses.replace(cfg, **changes)) for _ in range(2))
    resumed.restore(tmp_path)
    lrs(always, range(2))
    assert lrs(resumed, range(2, 4)) == lrs(always, range(2, 4))


def test_a_changed_weight_decay_applies_and_the_moments_stay(folder: Path, tmp_path: Path) -> None:
    started = learner(folder, OPTIMIZERS["adamw"])
    started.step(batch(0))
    started.save(tmp_path)
    same, other = (learner(folder, {**OPTIMIZERS["adamw"], **change}) for change in ({}, {"weight_decay": 0.5}))
    for each in (same, other):
        each.restore(tmp_path)
    lr = same.step(batch(1)).metrics["learner/lr"]
    other.step(batch(1))
    before, kept, decayed = (weights(each) for each in (started, same, other))
    for name, tensor in before.items():  # AdamW: the decay is apart from the gradient's step; the config's was 0.01
        torch.testing.assert_close(kept[name] - decayed[name], lr * (0.5 - 0.01) * tensor, atol=1e-7, rtol=1e-3)
