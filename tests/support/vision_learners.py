"""A learner on a tiny vision model, batches with images, and its gradients against PEFT's."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import shake
from fakes import make_rollout
from learners import SETTINGS, config
from peft import PeftModel
from tiny import picture
from transformers import AutoModelForImageTextToText
from vision_inputs import hugging_face_inputs

from learner.learner import Learner
from tora.adapters.inject import trained_parameters
from tora.batching.advantage import group_advantages
from tora.batching.batch import micro_batches
from tora.config.schema import RunConfig
from tora.models.vision.processor import ImageProcessor
from tora.types import Group, Prompt, Rollout, TrainBatch

SHOWN: list[list[tuple[int, int]]] = [[(64, 32)], [], [(32, 64), (96, 64)], [(64, 32), (64, 64)]]
"""Widths and heights of the images of each group's prompt; the first and the last prompt share an image."""

LOSS = {"_component_": "learner.loss.GRPOLoss", "importance_correction": "none"}

SGD = {"_component_": "torch.optim.SGD", "lr": 0.1}
"""With its default eps, Adam would turn the rounding error of a zero gradient into a full step."""


def vl_config(
    folder: Path, lora_type: str, train_vision: str, *, model: dict[str, Any] | None = None, **changes: Any
) -> RunConfig:
    """`model`: changes to that section."""
    cfg = config(folder, lora_type)
    section = dataclasses.replace(cfg.model, train_vision=train_vision, **model or {})
    return dataclasses.replace(cfg, model=section, **changes)


def vision_groups(folder: Path, shown: list[list[tuple[int, int]]] = SHOWN, seed: int = 0) -> list[Group]:
    processor, rng = ImageProcessor(folder), np.random.default_rng(seed)

    def rollout() -> Rollout:
        ids = rng.integers(10, 260, size=rng.integers(2, 12))
        logprobs = -rng.random(len(ids)).astype(np.float32) * 6
        reward = float(rng.random())
        return replace(make_rollout(ids, reward), actor_logprobs=logprobs)

    def group(number: int, sizes: list[tuple[int, int]]) -> Group:
        images = tuple(picture(*size, seed=size[0]) for size in sizes)
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": f"Which {'one' * number}?"}]
        ids = processor.encode([{"role": "user", "content": parts}], images)
        return Group(Prompt(number, ids, "", {}, images), tuple(rollout() for _ in range(3)))

    return [group(number, sizes) for number, sizes in enumerate(shown)]


def batch_of(groups: list[Group], capacity: int = 10_000, **changes: Any) -> TrainBatch:
    return TrainBatch(micro_batches(groups, capacity=capacity, **{**SETTINGS, **changes}), 1.0)


def check_gradients(cfg: RunConfig, adapter: Path) -> None:
    """Raises AssertionError unless a first step's gradients and log-probs are those of the exported policy in PEFT.

    `adapter`: where it is exported to.
    """
    learner, folder = Learner(cfg), Path(cfg.model.path)
    shake(learner.model)
    learner.export(adapter)
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    groups = vision_groups(folder)
    loss, mismatch = hand_made(theirs, folder, groups)
    loss.backward()
    expected = {
        n.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.grad is not None
    }
    gradients = spy_on_gradients(learner)
    assert learner.step(batch_of(groups)).metrics["mismatch_kl"] == pytest.approx(mismatch, rel=1e-3)
    suffix = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}
    names = learner.model.names
    for name, gradient in gradients.items():
        module, _, leaf = name.rpartition(".")
        theirs_name = f"{names.module_to_hf(module)}.{suffix[leaf]}" if leaf in suffix else names.parameter_to_hf(name)
        theirs_gradient = expected.pop(theirs_name)
        assert (gradient - theirs_gradient).abs().max() <= 3e-4 * theirs_gradient.abs().max() + 1e-9, name
    assert gradients and not expected


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
