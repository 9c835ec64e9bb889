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
from peft import PeftModel
from tiny import make_text_model, make_vl_model
from transformers import Qwen3VLForConditionalGeneration
from vision_inputs import hugging_face_inputs
from vision_learners import SGD, SHOWN, batch_of, vision_groups, vl_config

from learner.learner import Learner
from tora.adapters.inject import trained_parameters
from tora.batching.advantage import group_advantages
from tora.errors import ConfigError
from tora.models.vision.processor import ImageProcessor
from tora.types import Group, TrainBatch

LOSS = {"_component_": "learner.loss.GRPOLoss", "importance_correction": "none"}
KL = {**LOSS, "kl_coeff": 0.05}
TOWER_LINEARS = 3 * 4 + 2 * 3
"""Four linear layers in each of three blocks, two in each of three mergers."""
TOWER_TENSORS = 2 * TOWER_LINEARS + 3 * 4 + 3 * 2 + 3
"""Weights and biases of the linear layers, norms and patch embedding, and the position embedding."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vl_model(tmp_path_factory.mktemp("vl"))


def hand_made(model: Any, folder: Path, groups: list[Group]) -> tuple[torch.Tensor, float]:
    """The loss -Σ A log p / tokens, whose gradient equals that of the first step, and `mismatch_kl`. Transformers runs
    one sequence at a time, each with its own pixels."""
    processor, total, tokens, k3 = ImageProcessor(folder), torch.zeros(()), 0, 0.0
    for group in groups:
        advantages = group_advantages([r.reward for r in group.rollouts], True)
        for rollout, advantage in zip(group.rollouts, advantages, strict=True):
            ids = torch.tensor([*group.prompt.token_ids, *rollout.token_ids.tolist()])[None]
            inputs = hugging_face_inputs(processor, ids, group.prompt.images)
            logits = model(**inputs).logits[0, len(group.prompt.token_ids) - 1 : -1]
            logprobs = logits.log_softmax(1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            total, tokens = total - float(advantage) * logprobs.sum(), tokens + len(logprobs)
            d = logprobs.detach() - torch.tensor(rollout.actor_logprobs)
            k3 += float((d.expm1() - d).sum())
    return total / tokens, k3 / tokens


@pytest.mark.parametrize(
    ("lora_type", "train_vision"), [("lora", "none"), ("lora", "lora"), ("dora_cache", "lora"), ("dora", "full")]
)
def test_an_exported_policy_has_the_same_gradients_in_peft(
    tmp_path: Path, folder: Path, lora_type: str, train_vision: str
) -> None:
    learner = Learner(vl_config(folder, lora_type, train_vision, loss=LOSS))
    shake(learner.model)
    learner.export(tmp_path)
    base = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True)
    groups = vision_groups(folder)
    loss, mismatch = hand_made(theirs, folder, groups)
    loss.backward()
    expected = {
        n.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    gradients = spy_on_gradients(learner)
    assert learner.step(batch_of(groups)).metrics["mismatch_kl"] == pytest.approx(mismatch, rel=1e-3)
    suffix = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}
    names = learner.model.names
    for name, gradient in gradients.items():
        module, _, leaf = name.rpartition(".")
        theirs_name = f"{names.module_to_hf(module)}.{suffix[leaf]}" if leaf in suffix else names.parameter_to_hf(name)
        torch.testing.assert_close(gradient, expected.pop(theirs_name), atol=1e-6, rtol=1e-3)
    assert not expected


def spy_on_gradients(learner: Learner) -> dict[str, torch.Tensor]:
    """A dict that the next step fills, if it has one micro-batch."""
    gradients: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            gradients[name] = parameter.grad.clone()

        return hook

    for name, parameter in trained_parameters(learner.model).items():
        parameter.register_post_accumulate_grad_hook(keep(name))
    return gradients


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
