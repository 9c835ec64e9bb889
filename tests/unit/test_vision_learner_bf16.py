"""The vision learner in bf16 against PEFT in float32: little further from it than PEFT in bf16, which multiplies by A
and B in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import shake
from peft import PeftModel
from tiny import make_vl_model
from transformers import Qwen3VLForConditionalGeneration
from vision_inputs import hugging_face_inputs
from vision_learners import vision_groups, vl_config

from learner.learner import Learner
from tora.batching.batch import pack
from tora.batching.packing import OwnPrompts
from tora.models.vision.processor import ImageProcessor
from tora.types import Group


@torch.no_grad()
def logprobs(model: Any, folder: Path, groups: list[Group]) -> np.ndarray:
    processor, found = ImageProcessor(folder), []
    for group in groups:
        for rollout in group.rollouts:
            ids = torch.tensor([*group.prompt.token_ids, *rollout.token_ids.tolist()])[None]
            logits = model(**hugging_face_inputs(processor, ids, group.prompt.images)).logits[0].float()
            logits_NV = logits[len(group.prompt.token_ids) - 1 : -1]
            found.append(logits_NV.log_softmax(1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0])
    return torch.cat(found).numpy()


@pytest.mark.parametrize(("lora_type", "train_vision"), [("lora", "none"), ("dora_cache", "lora")])
def test_logprobs_are_as_exact_as_peft(tmp_path: Path, lora_type: str, train_vision: str) -> None:
    folder = make_vl_model(tmp_path / "model", dtype=torch.bfloat16)
    learner = Learner(vl_config(folder, lora_type, train_vision, dtype="bf16", lm_head_fp32=True))
    shake(learner.model)
    learner.export(tmp_path / "adapter")
    groups = vision_groups(folder)
    sequences = [(group.prompt, rollout, 0.0, i) for i, group in enumerate(groups) for rollout in group.rollouts]
    found = learner.logprobs(pack(OwnPrompts(), sequences, [1.0] * len(sequences)), adapter=True)

    def peft(dtype: torch.dtype) -> np.ndarray:
        base = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        return logprobs(PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval(), folder, groups)

    exact, alike = peft(torch.float32), peft(torch.bfloat16)
    assert 0 < np.abs(found - exact).mean() < 1.6 * np.abs(alike - exact).mean()
