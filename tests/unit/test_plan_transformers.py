"""The plan's count of what layers of transformers keep, on the meta device, against what autograd saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make_family
from learners import LOSS, config, make_batch, make_groups

from learner.learner import Learner
from tora.config.schema import ALL_LINEAR
from tora.launch.memory import model_shapes
from tora.plan.activations import MicroBatch, activations
from tora.plan.training import training_of
from tora.plan.transformers_shapes import TransformersShapes, layer_bytes
from tora.types import TrainBatch

TOLERANCE, OF_EXPERTS = 0.1, 0.2
"""Experts are counted in bf16, as the one product that they are there; in float32 they run one by one."""


def saved_bytes(learner: Learner, batch: TrainBatch) -> int:
    """Of the distinct tensors that autograd keeps in a step's forward pass, without weights."""
    held = [*learner.model.parameters(), *learner.model.buffers()]
    weights = {t.untyped_storage().data_ptr() for t in held}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if (storage := t.untyped_storage()).data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), t  # the tensor too, so that its address is not used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        learner.step(batch)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("lora_type", ["dora_cache", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_keep_what_is_counted(tmp_path: Path, family: str, lora_type: str) -> None:
    if "moe" in family and lora_type == "full":
        pytest.skip("refused")
    cfg = config(make_family(tmp_path, family), lora_type, loss=LOSS, model={"lora_targets": ALL_LINEAR})
    learner = Learner(cfg)
    prompt = tuple(range(20, 52))
    groups = [
        replace(
            group,
            prompt=replace(group.prompt, token_ids=prompt),
            rollouts=tuple(replace(group.rollouts[0], reward=float(i)) for i in range(8)),
        )
        for group in make_groups(2, seed=1)
    ]
    batch = make_batch(groups)
    (packed,) = batch.micro_batches
    shapes = model_shapes(cfg)
    assert isinstance(shapes, TransformersShapes)
    training = training_of(cfg, shapes)
    trained = sum(p.numel() for p in learner.model.parameters() if p.requires_grad)
    assert training.adapter_weights + training.master_weights == trained
    tokens, longest = len(packed.tokens_T), int(packed.lengths_B.max())
    counted = layer_bytes(cfg, shapes, None, tokens=tokens, longest=longest, on_gpu=False)
    size = MicroBatch(tokens, len(packed.response_N), 0, longest, on_gpu=False, counted=counted)
    found = activations(training, size).saved.total()
    assert found == pytest.approx(saved_bytes(learner, batch), rel=OF_EXPERTS if "moe" in family else TOLERANCE)
