"""A learner whose frozen weights are views of vLLM's, against one with weights of its own.

On a CPU vLLM repacks weights for its kernels. Here it is kept from that, and holds them as it does on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import make_text_model

pytest.importorskip("vllm")

from learners import LOSS, config, make_batch, make_groups, weights
from peft_reference import RANK
from vllm_engines import PROMPT, request, start_engine

from learner.learner import Learner
from learner.shared_base import SharedBase
from tora.adapters.inject import trained_parameters
from tora.types import LogprobRequest


@pytest.mark.parametrize(
    ("family", "tied", "dtype", "kind"), [("qwen2", False, "fp32", "dora"), ("qwen3", True, "bf16", "lora")]
)
def test_one_frozen_base_serves_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Any, tied: bool, dtype: Any, kind: str
) -> None:
    from vllm.model_executor.layers import utils

    monkeypatch.setattr(
        utils, "dispatch_cpu_unquantized_gemm", lambda layer, remove_weight: setattr(layer, "cpu_linear", F.linear)
    )
    full = torch.float32 if dtype == "fp32" else torch.bfloat16
    folder = make_text_model(tmp_path, family, tied=tied, dtype=full)
    engine = start_engine(folder, dtype=dtype)
    try:
        shared, cfg = SharedBase(engine.base_weights), config(folder, kind, loss=LOSS, dtype=dtype)
        assert cfg.model.lora_rank == RANK
        learner, own = Learner(cfg, shared_base=shared), Learner(cfg)
        trained = trained_parameters(learner.model)
        held = {name: parameter for name, parameter in learner.model.named_parameters() if name not in trained}
        matrices = {name for name in held if not name.endswith(".scale")}  # norms are float32 in the learner
        views = engine.base_weights([learner.model.names.parameter_to_hf(name) for name in matrices])
        served = {view.untyped_storage().data_ptr() for view in views.values()}
        assert all(held[name].untyped_storage().data_ptr() in served for name in matrices)
        assert shared.nbytes == sum(held[name].nbytes for name in matrices)
        assert len(served) < len(matrices), "q, k and v are parts of one matrix"

        engine.install(learner.snapshot())
        asked = [LogprobRequest(PROMPT, PROMPT)]
        before = engine.logprobs(asked, adapter=False)[0]
        for step in range(3):
            batch = make_batch(make_groups(3, seed=step))
            assert learner.step(batch).metrics == own.step(batch).metrics
        engine.install(learner.snapshot())
        assert all(torch.equal(weight, weights(own)[name]) for name, weight in weights(learner).items())
        np.testing.assert_array_equal(before, engine.logprobs(asked, adapter=False)[0])
        assert np.abs(before - engine.logprobs(asked, adapter=True)[0]).max() > 1e-4
        assert engine.generate([request()])[0]
    finally:
        engine.close()
