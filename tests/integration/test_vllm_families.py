"""Families that run transformers' code, each on a tiny random model: vLLM against the learner, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, make_family
from peft import PeftModel
from runs import read, steps, train
from transformers import AutoModelForCausalLM

from tora.bench.models import make_config, vllm_gap
from tora.bench.vision_families import VISION_FAMILIES, write_vision_family
from tora.config.load import load_config
from tora.errors import ConfigError
from tora.launch.in_process import check_in_process
from tora.launch.launcher import run

SHARED_CODE = ("smollm3", "olmo2")
"""vLLM serves these with transformers' own classes."""
ON_GPUS = ("qwen3_5",)
"""vLLM serves these with adapters on a GPU alone: `test_linear_attention.py` has the refusal."""
ON_CPUS = [family for family in FAMILIES if family not in ON_GPUS]


@pytest.mark.slow
@pytest.mark.parametrize("family", ON_CPUS)
def test_vllm_samples_from_the_learners_policy(tmp_path: Path, family: str) -> None:
    """With LoRA and with DoRA, on all layers that may carry an adapter."""
    pytest.importorskip("vllm")
    gap = vllm_gap(make_family(tmp_path, family), family)
    assert isinstance(gap, float) and gap < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "vllm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps_of_grpo(tmp_path: Path, family: str, engine: str) -> None:
    if engine == "vllm" and family in (*SHARED_CODE, *ON_GPUS):
        pytest.skip("refused: see below")
    folder = make_family(tmp_path / "base", family)
    overrides = ["async_rl=false", f"rollout.engine={engine}", f"model.path={folder}", "model.lora_type=dora_cache"]
    overrides += ["model.lora_targets=all-linear"]
    rows = train("quickstart", tmp_path / "run", *overrides, "max_generated_tokens=24", "loss.kl_coeff=0.01")
    assert [row["version"] for row in steps(rows)] == [1, 2, 3]
    assert max(row["mismatch_kl"] for row in steps(rows)) < 1e-8
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    assert next(iter(adapted.peft_config.values())).use_dora  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["smollm3", "mistral"])
def test_a_class_that_vllm_would_change_is_refused_beside_the_learner(tmp_path: Path, family: str) -> None:
    pytest.importorskip("vllm")
    cfg = make_config(make_family(tmp_path, family), "vllm")
    if family == "mistral":
        check_in_process(cfg)
        return
    with pytest.raises(ConfigError, match=r"serves SmolLM3ForCausalLM with transformers' own classes"):
        check_in_process(cfg)


RECIPES = {
    "gemma3": "gemma3/1B_lora_grpo_single_device",
    "mistral": "mistral/7B_lora_grpo_single_device",
    "phi4-mini": "phi4/mini_lora_grpo_single_device",
    "smollm3": "smollm3/3B_lora_grpo_single_device",
    "qwen3_5_vl": "qwen3_5/0.8B_lora_grpo_single_device",
    "qwen3_moe": "qwen3_moe/30B_A3B_lora_grpo_single_device",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", RECIPES)
def test_recipes_run_on_a_tiny_model_of_their_structure(tmp_path: Path, family: str) -> None:
    """With their own precision, targets and optimizer. Qwen3.5's folders hold a tower too."""
    task = ["dataset={_component_: tora.tasks.chain_sum.chain_sum, split: train}", "eval=null"]
    task += ["rewards=[{_component_: tora.rewards.length, target: 1, limit: 90}]"]
    size = ["num_steps=2", "batch_size=2", "grpo_samples=4", "max_generated_tokens=24", "rollout.engine=torch"]
    folder = (write_vision_family if family in VISION_FAMILIES else make_family)(tmp_path / "base", family)
    template = folder / "chat_template.jinja"
    template.write_text("{%- set thinks = enable_thinking -%}" + template.read_text())  # as SmolLM3's has it
    cfg = load_config(RECIPES[family], [*task, *size, f"model.path={folder}", f"output_dir={tmp_path}/run"])
    assert run(cfg)
    rows = read(tmp_path / "run")
    assert [row["version"] for row in steps(rows)] == [1, 2]
    assert max(row["mismatch_kl"] for row in steps(rows)) < 1e-2
