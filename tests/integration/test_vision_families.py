"""Families with images that run transformers' code, each on a tiny random model: whole runs, and vLLM."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel
from runs import steps, train
from tiny import picture
from transformers import AutoModelForImageTextToText

from tora.bench.vision_families import VISION_FAMILIES, write_vision_family


@pytest.fixture(params=VISION_FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "smolvlm" and importlib.util.find_spec("num2words") is None:
        pytest.skip("its processor needs the package num2words")
    return write_vision_family(tmp_path / request.param, request.param)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_three_steps_of_grpo(tmp_path: Path, folder: Path, engine: str) -> None:
    if engine == "vllm" and folder.name in ("gemma3_vl", "qwen3_5_vl") and not torch.cuda.is_available():
        pytest.skip("refused: test_generic_vision.py")
    overrides = ["async_rl=false", f"rollout.engine={engine}", f"model.path={folder}", "model.lora_type=dora_cache"]
    overrides += [f"model.train_vision={'lora' if engine == 'torch' else 'none'}", "max_generated_tokens=24"]
    rows = train("quickstart_vl", tmp_path / "run", *overrides, "loss.kl_coeff=0.01")
    assert [row["version"] for row in steps(rows)] == [1, 2, 3]
    assert max(row["mismatch_kl"] for row in steps(rows)) < 1e-8
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    assert next(iter(adapted.peft_config.values())).use_dora  # pyright: ignore[reportAttributeAccessIssue]


RECIPES = {
    "qwen2_5_vl/3B_lora_grpo_single_device": "qwen2_5_vl",
    "qwen2_5_vl/7B_lora_grpo_single_device": "qwen2_5_vl",
    "gemma3/4B_lora_grpo_single_device": "gemma3_vl",
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.usefixtures("datasets_cache")
def test_recipes_run_on_a_tiny_model_of_their_structure(tmp_path: Path, recipe: str) -> None:
    """With their own precision, targets and optimizer, on CLEVR's columns."""
    folder = write_vision_family(tmp_path / "base", RECIPES[recipe])
    rows = [
        {"image": {"bytes": picture(48, 32, seed=i)}, "problem": "How many?", "solution": f"<answer> {i} </answer>"}
        for i in range(8)
    ]
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "problem": text, "solution": text})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "clevr.parquet")
    overrides = [f"model.path={folder}", "max_generated_tokens=16", "rollout.engine=torch", "max_prompt_tokens=480"]
    overrides += ["rewards=[{_component_: tora.rewards.length, target: 2, limit: 40}]"]
    for key in ("dataset", "eval.dataset"):
        overrides += [f"{key}.path={tmp_path / 'clevr.parquet'}", f"{key}.split=train"]
    found = steps(train(recipe, tmp_path / "run", *overrides))
    assert [row["version"] for row in found] == [1, 2, 3]
    assert max(row["mismatch_kl"] for row in found) < 1e-2
