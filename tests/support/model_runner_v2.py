"""A plugin of pytest: engines of vLLM on a CPU have Model Runner V2, as on a GPU, with Triton's interpreter for its
kernels."""

from __future__ import annotations

import os
import sys

os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
import triton_on_cpu  # noqa: F401

# isort: split
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def kernels() -> Iterator[None]:
    """The interpreter does not run vLLM's own kernel of top-k and top-p; its form in PyTorch does the same."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
    from vllm.v1.worker.gpu.sample import sampler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "apply_top_k_top_p", apply_top_k_top_p_pytorch)
        yield
    assert "vllm.v1.worker.cpu.model_runner" in sys.modules, "no engine had it"
