"""A pretrained model learns one-digit sums, asynchronously with vLLM, whatever is trained and in whichever dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import read

pytest.importorskip("vllm")
pytest.importorskip("ray")

from tora.config.load import load_config
from tora.launch.launcher import run

METHODS = {
    "lora": [],
    "dora_cache": ["model.lora_type=dora_cache"],
    "qlora": ["model.quantize_base=true"],
    "full": ["model.lora_type=full", "optimizer.lr=2e-5"],
}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_sums(smollm2: Path, tmp_path: Path, method: str, dtype: str) -> None:
    changes = [f"model.path={smollm2}", f"output_dir={tmp_path / 'run'}", f"dtype={dtype}", *METHODS[method]]
    cfg = load_config("smollm2/135M_sums", changes)
    assert run(cfg)
    rows = read(tmp_path / "run")
    held_out = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    assert held_out[0] < 0.3 and held_out[-1] >= 0.85, held_out
