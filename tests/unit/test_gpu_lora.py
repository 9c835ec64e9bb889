"""vLLM's LoRA products on a GPU, as far as a CPU can prove them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from actors.vllm_engine.gpu_lora import slot_products, wrap

SLOTS = torch.tensor([0, 2, 1, -1, 0, 2, 2, -1, 1])
SIZES = (5, 3, 3)


def by_hand(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    rows = torch.zeros(len(x), b.shape[1], dtype=torch.float64)
    for i, slot in enumerate(SLOTS.tolist()):
        if slot >= 0:
            rows[i] = b[slot].double() @ (a[slot].double() @ x[i].double())
    return rows


def random_slots(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 7, generator=generator), torch.randn(3, size, 4, generator=generator)


def test_each_token_gets_its_own_slot_and_minus_one_gets_none() -> None:
    x, (a, b) = torch.randn(9, 7), random_slots(5, 0)
    torch.testing.assert_close(slot_products(x, a, b, SLOTS).double(), by_hand(x, a, b), atol=1e-5, rtol=1e-5)
    a[1] = torch.nan
    found = slot_products(x, a, b, SLOTS)
    assert found[SLOTS == 1].isnan().all() and found[SLOTS != 1].isfinite().all(), "slots do not leak"


def test_vllms_wrapper_takes_float32_and_leaves_16_bits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(PunicaWrapperGPU, "add_lora_linear", lambda *args, **kwargs: calls.append((args, kwargs)))
    for _ in range(2):
        wrap(PunicaWrapperGPU)
    wrapper: Any = SimpleNamespace(_token_lora_indices=torch.cat([SLOTS, torch.full((4,), -1)]))
    x, parts = torch.randn(9, 7), [random_slots(size, seed) for seed, size in enumerate(SIZES)]
    stacked = [tuple(part[which][:, None] for part in parts) for which in (0, 1)]
    base = torch.randn(9, sum(SIZES))
    y = base.clone()
    PunicaWrapperGPU.add_lora_linear(wrapper, y, x, *stacked, 0.5, SIZES)
    expected = base.double() + 0.5 * torch.cat([by_hand(x, *part) for part in parts], 1)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    assert not calls
    PunicaWrapperGPU.add_lora_linear(wrapper, y.bfloat16(), x.bfloat16(), *stacked, 0.5, SIZES, add_inputs=True)
    ((args, kwargs),) = calls
    assert args[0] is wrapper and args[5:] == (0.5, SIZES) and kwargs == {"add_inputs": True}
    PunicaWrapperGPU.add_lora_linear(wrapper, y, x.bfloat16(), *stacked, 0.5, SIZES)
    assert calls[1][0][1].dtype == torch.bfloat16, "the kernels read B in the output's dtype"


def test_the_product_has_static_shapes_for_a_graph() -> None:
    x, (a, b) = torch.randn(9, 7), random_slots(5, 0)
    compiled = torch.compile(slot_products, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, a, b, SLOTS), slot_products(x, a, b, SLOTS))
