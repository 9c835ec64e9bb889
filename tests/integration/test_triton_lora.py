"""vLLM's own Triton kernels under our layers, by Triton's interpreter: see `tests/support/interpreted_lora.py`."""

from __future__ import annotations

import pytest
from interpreted import printed_by

pytest.importorskip("vllm")
pytest.importorskip("triton")


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return printed_by("interpreted_lora.py")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2e-3), ("float32", 1e-6)])
def test_each_row_is_its_adapters(errors: dict[str, float], dtype: str, bound: float) -> None:
    """Slots, rows without adapter, padding rows, packed and partly adapted layers, parts of two tensor-parallel ranks.
    Float16 rounds a product by up to 5e-4 of itself, and the base's, LoRA's and their scaled sum are three of them."""
    found = {case: error for case, error in errors.items() if f", {dtype}, " in case}
    assert len(found) == 32
    assert not {case: error for case, error in found.items() if not error < bound}
