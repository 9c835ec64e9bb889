"""vLLM on a CPU: a LoRA product grouped by adapter slot, and a sampler that needs no C++ compiler.

Shape letters: T tokens of a batch, I inputs, O outputs, R rank, B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


def install() -> None:
    """Call before the model is built. Does nothing on a GPU."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import sampler

    if current_platform.is_cpu():
        # vLLM 0.32 gets the class's import path from the platform and has no setting for it.
        path = f"{__name__}.{GroupedLoRA.__name__}"
        setattr(type(current_platform), "get_punica_wrapper", classmethod(lambda cls: path))  # noqa: B010
        # vLLM 0.32 compiles this function to compute token ranks that are never read here. That costs seconds at the
        # first request of each process and fails without a C++ compiler.
        setattr(sampler, "batched_count_greater_than", _count_at_least)  # noqa: B010


def _count_at_least(x_BV: torch.Tensor, values_B1: torch.Tensor) -> torch.Tensor:
    return (x_BV >= values_B1).sum(-1)


class GroupedLoRA(PunicaWrapperCPU):
    """Computes two small products for each slot in the batch."""

    _groups: Sequence[tuple[int, torch.Tensor | None]] = ()
    """(slot, the batch's rows that use it), with None for all rows."""

    def update_metadata(self, mapping: Any, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(mapping, *args, **kwargs)
        slot_T = self.token_lora_indices
        slots = torch.unique(slot_T).tolist()
        is_uniform = len(slots) == 1
        self._groups = [(s, None if is_uniform else (slot_T == s).nonzero()[:, 0]) for s in slots if s >= 0]

    # vLLM 0.32's own version gathers a [T, O, R] tensor of weights, which is 6 to 25 times slower. It also takes the
    # last slot's weights for a token without adapter (index -1), so base rows in a mixed batch would get that adapter.
    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """`y[T, O] += scale · x[T, I] Aᵀ Bᵀ` in place, with A [R, I] and B [O, R] of each token's slot; computed in
        y's dtype, float32."""
        for slot, rows in self._groups:
            x_TI = (x if rows is None else x[rows]).to(y.dtype)
            start = 0
            for a_stacked, b_stacked, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                part_TO = y[:, start : start + size]
                hidden_TR = x_TI @ a_stacked[slot, 0].to(y.dtype).T
                b_RO = b_stacked[slot, 0].to(y.dtype).T
                if rows is None:
                    part_TO.addmm_(hidden_TR, b_RO, alpha=scale)
                else:
                    part_TO.index_add_(0, rows, hidden_TR @ b_RO, alpha=scale)
                start += size
