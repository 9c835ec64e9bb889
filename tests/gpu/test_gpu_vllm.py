"""vLLM on a GPU, in the dtypes that its own LoRA kernels take and in float32, which they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_reference import Reference
from tiny import make_text_model
from vllm_engines import request, start_engine

pytest.importorskip("vllm")


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-3), ("bf16", 0.1)])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_rollouts_are_of_the_policy(tmp_path: Path, kind: str, dtype: str, bound: float) -> None:
    folder = make_text_model(tmp_path, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    reference = Reference(folder)
    engine = start_engine(folder, dtype=dtype, enforce_eager=False)
    try:
        engine.install(reference.snapshot(1, kind, 1))
        asked = request(num_samples=4)
        for completion in engine.generate([asked])[0]:
            assert reference.error(kind, 1, asked, completion) < bound
    finally:
        engine.close()
