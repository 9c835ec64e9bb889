"""vLLM's LoRA products on a GPU, for dtypes that its Triton kernels do not take.

vLLM 0.32's and 0.33's kernels assert 16-bit weights at start-up; float32 products are torch's. And in a packed layer
the kernels read B as if it had the output's dtype, so a 16-bit product for a float32 output is computed apart.

Shape letters: T tokens of a batch, S slots, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def install() -> None:
    """Call before the model is built. Does nothing on a CPU."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda_alike():
        from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

        wrap(PunicaWrapperGPU)


def wrap(punica_wrapper: Any) -> None:
    """Have a class of vLLM's LoRA products take float32 inputs, and 16-bit inputs with a float32 output.

    16-bit inputs with an output of their own dtype stay as they are. A second call does nothing.
    """
    inner: Callable[..., None] = punica_wrapper.add_lora_linear
    if getattr(inner, "takes_float32", False):
        return

    def add_lora_linear(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        if x.dtype != torch.float32:
            # zeros, because the kernels leave rows without adapter alone
            own = y if y.dtype == x.dtype else torch.zeros_like(y, dtype=x.dtype)
            inner(self, own, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs)
            if own is not y:
                y += own
            return
        # the wrapper's public property slices these indices by a Python int, which a graph would freeze
        slot_T = self._token_lora_indices[: x.shape[0]]
        start = 0
        for a_S1RI, b_S1OR, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            y[:, start : start + size] += scale * slot_products(x, a_S1RI[:, 0], b_S1OR[:, 0], slot_T)
            start += size

    add_lora_linear.takes_float32 = True  # pyright: ignore[reportFunctionMemberAccess]
    punica_wrapper.add_lora_linear = add_lora_linear


def slot_products(x_TI: torch.Tensor, a_SRI: torch.Tensor, b_SOR: torch.Tensor, slot_T: torch.Tensor) -> torch.Tensor:
    """`x Aᵀ Bᵀ` with each token's slot, [T, O]; 0 for index -1, a token without adapter.

    Every token is multiplied with the A of all slots, of which there are two or three, and all but its own are masked:
    shapes do not depend on the batch's slots, so that a CUDA graph can record it.
    """
    slots_S = torch.arange(a_SRI.shape[0], device=slot_T.device)
    own_TS1 = (slot_T[:, None] == slots_S)[:, :, None]
    hidden_TSR = (x_TI @ a_SRI.flatten(0, 1).T).unflatten(1, a_SRI.shape[:2])
    hidden_TSR = hidden_TSR.masked_fill(~own_TS1, 0)  # not a product, which would carry nan from another slot
    return torch.einsum("tsr,sor->to", hidden_TSR, b_SOR)
