"""A learner on a tiny Qwen3-VL, and batches with images."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fakes import make_rollout
from learners import SETTINGS, config
from tiny import picture

from tora.batching.batch import micro_batches
from tora.config.schema import RunConfig
from tora.models.vision.processor import ImageProcessor
from tora.types import Group, Prompt, Rollout, TrainBatch

SHOWN: list[list[tuple[int, int]]] = [[(64, 32)], [], [(32, 64), (96, 64)], [(64, 32), (64, 64)]]
"""Widths and heights of the images of each group's prompt; the first and the last prompt share an image."""

SGD = {"_component_": "torch.optim.SGD", "lr": 0.1}
"""With its default eps, Adam would turn the rounding error of a zero gradient into a full step."""


def vl_config(folder: Path, lora_type: str, train_vision: str, **changes: Any) -> RunConfig:
    cfg = config(folder, lora_type)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, train_vision=train_vision), **changes)


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
