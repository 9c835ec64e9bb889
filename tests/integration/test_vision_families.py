"""Families with images that run transformers' code, each on a tiny random model: whole runs, and vLLM."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from runs import steps, train
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
    overrides = ["async_rl=false", f"rollout.engine={engine}", f"model.path={folder}", "model.lora_type=dora_cache"]
    overrides += [f"model.train_vision={'lora' if engine == 'torch' else 'none'}", "max_generated_tokens=24"]
    rows = train("quickstart_vl", tmp_path / "run", *overrides, "loss.kl_coeff=0.01")
    assert [row["version"] for row in steps(rows)] == [1, 2, 3]
    assert max(row["mismatch_kl"] for row in steps(rows)) < 1e-8
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    assert next(iter(adapted.peft_config.values())).use_dora  # pyright: ignore[reportAttributeAccessIssue]
