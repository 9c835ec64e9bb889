"""Folders that PEFT has written for a vision model: adapters in the tower, and a tower that is trained whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from references import KL, peft_logprobs, seen_reference
from tiny import LINEARS, make_vl_model
from transformers import Qwen3VLForConditionalGeneration
from vision_learners import batch_of, vision_groups, vl_config

from learner.learner import Learner
from tora.config.schema import ALL_LINEAR
from tora.errors import ConfigError

QV = ["q_proj", "v_proj"]
PATTERNS = {"rank_pattern": {"attn.qkv": 2}, "alpha_pattern": {"merger.linear_fc1": 8}}
TOWER = ["attn.qkv", "attn.proj", "linear_fc1", "linear_fc2"]


@pytest.fixture(scope="module")
def vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vl_model(tmp_path_factory.mktemp("vl"))


def peft_folder(base: Path, folder: Path, **fields: Any) -> Path:
    """An adapter with random tensors, and beside it a tower with other weights if the config saves one."""
    model: Any = Qwen3VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 32, "task_type": "CAUSAL_LM", **fields}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "modules_to_save" in name:
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


CASES: dict[str, tuple[dict[str, Any], str, Any]] = {
    "all-linear": ({"target_modules": "all-linear"}, "lora", ALL_LINEAR),
    "patterns in the tower": ({"target_modules": [*LINEARS, *TOWER], **PATTERNS}, "lora", list(LINEARS)),
    "the tower whole": ({"target_modules": QV, "modules_to_save": ["visual"]}, "full", QV),
    "only the decoder": ({"target_modules": r".*language_model.*\.[qv]_proj"}, "none", QV),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_computes_what_peft_computes(tmp_path: Path, vl: Path, case: str) -> None:
    fields, train_vision, targets = CASES[case]
    folder, groups = peft_folder(vl, tmp_path / "adapter", **fields), vision_groups(vl)
    cfg = vl_config(vl, "lora", train_vision, loss=KL)
    model = dataclasses.replace(cfg.model, adapter_path=str(folder), lora_targets=targets)
    learner = Learner(dataclasses.replace(cfg, model=model))
    batch = batch_of(groups)
    learner.step(batch)  # its reference is the policy that it starts with
    expected = peft_logprobs(vl, folder, groups, "fp32")
    torch.testing.assert_close(seen_reference(batch, groups), expected, atol=5e-4, rtol=1e-5)
    assert (expected - peft_logprobs(vl, None, groups, "fp32")).abs().max() > 0.1


@pytest.mark.parametrize(
    ("fields", "train_vision", "words"),
    [
        ({"target_modules": list(LINEARS), "modules_to_save": ["visual"]}, "none", r"modules_to_save=\['visual'\]"),
        ({"target_modules": list(LINEARS)}, "full", r"modules_to_save=\[\], and .*train_vision=full"),
        ({"target_modules": [*LINEARS, "attn.qkv"]}, "none", "visual.*qkv.lora_A.weight', which only the adapter has"),
        ({"target_modules": [*LINEARS, "attn.qkv"]}, "lora", "visual.* which only this run has"),
    ],
)
def test_another_tower_is_refused_by_name(
    tmp_path: Path, vl: Path, fields: dict[str, Any], train_vision: str, words: str
) -> None:
    cfg = vl_config(vl, "lora", train_vision)
    model = dataclasses.replace(cfg.model, adapter_path=str(peft_folder(vl, tmp_path, **fields)))
    with pytest.raises(ConfigError, match=words):
        Learner(dataclasses.replace(cfg, model=model))
