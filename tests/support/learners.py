"""One learner rank on a tiny model, and batches for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from fakes import make_prompt, make_rollout

from learner.learner import Learner
from tora.adapters.inject import trained_parameters
from tora.batching.batch import micro_batches
from tora.config.schema import ModelConfig, RunConfig
from tora.types import Group, Rollout, TrainBatch

SETTINGS: dict[str, Any] = {"normalize_advantages": True, "normalization": "token", "max_generated_tokens": 20}


def config(
    folder: Path,
    lora_type: str = "lora",
    *,
    quantize_base: bool = False,
    model: dict[str, Any] | None = None,
    **changes: Any,
) -> RunConfig:
    """`model`: further keys of `model`."""
    return RunConfig(
        name="test",
        num_steps=10,
        model=ModelConfig(
            path=str(folder), lora_type=lora_type, lora_rank=4, quantize_base=quantize_base, **(model or {})
        ),
        dataset={},
        rewards=[],
        lr_scheduler={"_component_": "transformers.get_cosine_schedule_with_warmup", "num_warmup_steps": 0},
        **{"dtype": "fp32", "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3}, **changes},
    )


def make_groups(count: int = 3, seed: int = 0, version: int = 0, *, episodes: bool = False) -> list[Group]:
    """`episodes`: about every third token is an environment's, often the first and the last."""
    rng = np.random.default_rng(seed)

    def rollout() -> Rollout:
        ids = rng.integers(3, 259, size=rng.integers(2, 20))
        logprobs = -rng.random(len(ids)).astype(np.float32) * 6
        reward = float(rng.random())
        sampled = rng.random(len(ids)) < 0.65 if episodes else np.ones(len(ids), dtype=bool)
        sampled[len(ids) // 2] = True
        return replace(make_rollout(ids, reward, version, sampled=sampled), actor_logprobs=logprobs[sampled])

    return [Group(make_prompt(i, length=4 + i), tuple(rollout() for _ in range(4))) for i in range(count)]


def make_batch(groups: list[Group], capacity: int = 10_000, temperature: float = 1.0, **changes: Any) -> TrainBatch:
    return TrainBatch(micro_batches(groups, capacity=capacity, **{**SETTINGS, **changes}), temperature)


def in_parts(groups: Sequence[Group], cuts: Sequence[int], capacity: int = 60, **changes: Any) -> list[TrainBatch]:
    """`cuts`: where a part ends and the next begins."""
    bounds = [*pairwise([0, *cuts, len(groups)])]
    asked = 2 * sum(len(group.rollouts) for group in groups)  # as if half of them were left out
    settings = {**SETTINGS, **changes, "asked": asked, "is_part": True}
    packed = [micro_batches(groups[a:b], capacity=capacity, first=a, **settings) for a, b in bounds]
    ids = tuple(group.prompt.id for group in groups)
    return [TrainBatch(micro, 1.0, prompt_ids=ids, is_last=i == len(bounds) - 1) for i, micro in enumerate(packed)]


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trained_parameters(learner.model).items()}


LOSS = {"_component_": "learner.loss.GRPOLoss", "kl_coeff": 0.05}


def train(folder: Path, lora_type: str, **changes: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The metrics of three steps, including the gradient norm, and the weights afterwards."""
    learner = Learner(config(folder, lora_type, loss=LOSS, **changes))
    batches = [make_batch(make_groups(3, seed=i), capacity=capacity) for i, capacity in enumerate((10_000, 60, 90))]
    metrics = [learner.step(batch).metrics for batch in batches]
    return metrics, {name: p.detach().clone() for name, p in trained_parameters(learner.model).items()}
