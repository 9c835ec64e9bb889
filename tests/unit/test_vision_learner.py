"""The learner on prompts with images, against transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from adapters import shake
from comparisons import compare
from learners import config, weights
from tiny import make_text_model, make_vl_model
from transformers import Qwen3VLForConditionalGeneration
from vision_learners import LOSS, SGD, SHOWN, batch_of, check_gradients, hand_made, vision_groups, vl_config

from learner.learner import Learner
from tora.adapters.inject import from_wire, trained_parameters
from tora.adapters.snapshot import unpack
from tora.errors import ConfigError
from tora.types import TrainBatch

KL = {**LOSS, "kl_coeff": 0.05}
TOWER_LINEARS = 3 * 4 + 2 * 3
"""Four linear layers in each of three blocks, two in each of three mergers."""
TOWER_TENSORS = 2 * TOWER_LINEARS + 3 * 4 + 3 * 2 + 3
"""Weights and biases of the linear layers, norms and patch embedding, and the position embedding."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vl_model(tmp_path_factory.mktemp("vl"))


@pytest.mark.parametrize(
    ("lora_type", "train_vision"), [("lora", "none"), ("lora", "lora"), ("dora_cache", "lora"), ("dora", "full")]
)
def test_an_exported_policy_has_the_same_gradients_in_peft(
    tmp_path: Path, folder: Path, lora_type: str, train_vision: str
) -> None:
    check_gradients(vl_config(folder, lora_type, train_vision, loss=LOSS), tmp_path)


@pytest.mark.parametrize(("lora_type", "train_vision"), [("dora_cache", "lora"), ("full", "full"), ("full", "none")])
def test_packing_does_not_change_the_update(folder: Path, lora_type: str, train_vision: str) -> None:
    """One micro-batch or several, prompts shared or not; each computes the features of an image once."""
    packings: list[dict[str, Any]] = [{}, {"capacity": 100}, {"share_prefix": True}]
    learners = [Learner(vl_config(folder, lora_type, train_vision, loss=KL, optimizer=SGD)) for _ in packings]
    groups = vision_groups(folder)
    for _ in range(2):
        results = [
            learner.step(batch_of(groups, **packing)) for learner, packing in zip(learners, packings, strict=True)
        ]
    for other, result in zip(learners[1:], results[1:], strict=True):
        for name, value in results[0].metrics.items():
            assert result.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
        compare(weights(learners[0]), weights(other))


@pytest.mark.parametrize("share_prefix", [False, True])
def test_each_distinct_image_goes_through_the_tower_once(folder: Path, share_prefix: bool) -> None:
    learner = Learner(vl_config(folder, "lora", "none"))
    patches: list[int] = []
    learner.model.visual.register_forward_pre_hook(lambda _, inputs: patches.append(len(inputs[0])))
    (micro,) = batch_of(vision_groups(folder), share_prefix=share_prefix).micro_batches
    learner.step(TrainBatch((micro,), 1.0))
    distinct = {size for sizes in SHOWN for size in sizes}
    assert patches == [sum(width * height // 16**2 for width, height in distinct)]


@pytest.mark.parametrize(
    ("lora_type", "train_vision", "num_in_tower"),
    [
        ("lora", "none", 0),
        ("dora_cache", "lora", 3 * TOWER_LINEARS),
        ("lora", "full", TOWER_TENSORS),
        ("full", "none", 0),
        ("full", "full", TOWER_TENSORS),
    ],
)
def test_a_step_changes_exactly_the_trained_parameters(
    folder: Path, lora_type: str, train_vision: str, num_in_tower: int
) -> None:
    learner = Learner(vl_config(folder, lora_type, train_vision))
    trained, before = set(trained_parameters(learner.model)), dict(learner.model.named_parameters())
    before = {name: p.detach().clone() for name, p in before.items()}
    assert len([name for name in trained if name.startswith("visual.")]) == num_in_tower
    for _ in range(2):
        learner.step(batch_of(vision_groups(folder)))
    moved = {name for name, p in learner.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained
    names = {entry.name for entry in learner.snapshot().entries}
    assert any(name.startswith("model.visual.blocks.0.attn.qkv.") for name in names) == (train_vision != "none")


def test_a_full_run_exports_the_whole_model(tmp_path: Path, folder: Path) -> None:
    learner = Learner(vl_config(folder, "full", "none", loss=LOSS))
    groups = vision_groups(folder)
    learner.step(batch_of(groups))
    learner.export(tmp_path)
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        _, mismatch = hand_made(theirs, tmp_path, groups)
    assert learner.step(batch_of(groups)).metrics["mismatch_kl"] == pytest.approx(mismatch, rel=1e-3)


def test_a_text_model_has_no_tower_to_train(tmp_path: Path, folder: Path) -> None:
    text = make_text_model(tmp_path)
    with pytest.raises(ConfigError, match=r"train_vision=lora, but .* no vision tower"):
        Learner(vl_config(text, "lora", "lora"))
    with pytest.raises(ValueError, match="prompts have images, but the model takes none"):
        Learner(config(text)).step(batch_of(vision_groups(folder)))


@pytest.mark.parametrize("train_vision", ["none", "lora"])
def test_both_implementations_of_a_vision_model_agree(folder: Path, train_vision: str) -> None:
    """Log-probs, metrics and the adapters after two steps."""
    found = []
    for implementation in ("native", "transformers"):
        changes = {"implementation": implementation}
        learner = Learner(vl_config(folder, "dora_cache", train_vision, loss=KL, optimizer=SGD, model=changes))
        if found:
            from_wire(learner.model, found[0][0])
        else:
            shake(learner.model)
        start, groups = unpack(learner.snapshot()), vision_groups(folder)
        metrics = [learner.step(batch_of(groups, capacity=200)).metrics for _ in range(2)]
        found.append((start, metrics, unpack(learner.snapshot())))
    (_, native, adapters), (_, generic, others) = found
    for ours, theirs in zip(native, generic, strict=True):
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    compare(adapters, others)
