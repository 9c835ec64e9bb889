"""Whole runs on one GPU, each in a process of its own, as users start them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from runs import SHORT, read, steps

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("quickstart", ["async_rl=false", "rollout.engine=torch", "compile=true"]),
        ("quickstart", ["async_rl=false", "rollout.engine=vllm"]),
        ("quickstart", ["async_rl=false", "rollout.engine=vllm", "dtype=bf16", "model.lora_type=dora_cache"]),
        # three actors share the GPU, and workers start after the learner, one after the other
        ("quickstart", ["rollout.num_workers=2", "rollout.gpu_memory_utilization=0.2"]),
        ("quickstart_vl", ["rollout.engine=vllm", "dtype=bf16", "model.lora_type=dora", "model.train_vision=lora"]),
    ],
    ids=["torch, compiled", "vLLM", "vLLM in bf16, DoRA", "three on one GPU", "images in bf16"],
)
def test_three_steps(tmp_path: Path, config: str, overrides: list[str]) -> None:
    words = ["run", config, *SHORT, "sync.canary_every=1", *overrides, f"output_dir={tmp_path}/run"]
    done = subprocess.run([sys.executable, "-m", "tora", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    rows = steps(read(tmp_path / "run"))
    assert len(rows) == 3
    bound = 5e-3 if "dtype=bf16" in overrides else 1e-6
    assert all(row["mismatch_kl"] < bound for row in rows)
