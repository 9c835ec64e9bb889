"""Weight-decomposed low-rank adaptation (DoRA, Liu et al. 2024, arXiv:2402.09353, eq. 5 and 11):
    y = g ⊙ (W x + s·B A x) + b,   g = m / ‖W + s·B A‖, norms by row, m trained

The norm is a constant to autograd, as section 4.3 of the paper proposes. It is computed without the product B A:
    ‖W + s·B A‖² = ‖W‖² + 2s·rowsum((W Aᵀ) ∘ B) + s²·rowsum((B (A Aᵀ)) ∘ B)
Shape letters: R rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from tora.adapters.lora import LoRALinear
from tora.adapters.snapshot import GAIN
from tora.distributed.sharding import local, local_rows
from tora.models.quantize import frozen_linear, row_slabs


def squared_row_norm(weight_OI: torch.Tensor) -> torch.Tensor:
    """‖W‖² by row, [O] float32."""
    return torch.cat([slab.square().sum(1) for slab in row_slabs(weight_OI)])


def adapted_row_norm(
    squared_O: torch.Tensor, w_a_OR: torch.Tensor, lora_a_RI: torch.Tensor, lora_b_OR: torch.Tensor, scaling: float
) -> torch.Tensor:
    """‖W + s·B A‖ by row, [O] float32. `squared_O` is ‖W‖² by row, `w_a_OR` is W Aᵀ; all inputs float32."""
    gram_RR = lora_a_RI @ lora_a_RI.T
    cross_O = (w_a_OR * lora_b_OR).sum(1)
    update_O = ((lora_b_OR @ gram_RR) * lora_b_OR).sum(1)
    return (squared_O + 2 * scaling * cross_O + scaling**2 * update_O).clamp_min(0).sqrt()


class DoRALinear(LoRALinear):
    """Recomputes the row norm in every forward. A's rows are appended to the inputs, so that the base product yields
    W Aᵀ as well."""

    use_dora = True
    squared_norm: torch.Tensor
    """‖W‖² by row, [O] float32."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank, scaling, dropout)
        device = base.weight.device
        self.magnitude = nn.Parameter(torch.empty(base.out_features, dtype=torch.float32, device=device))
        self.register_buffer("squared_norm", torch.empty_like(self.magnitude), persistent=False)

    def adapter_params(self) -> list[str]:
        return [*super().adapter_params(), "magnitude"]

    @torch.no_grad()
    def reset_adapter(self) -> None:
        super().reset_adapter()
        self.squared_norm.copy_(squared_row_norm(self.weight))
        self.magnitude.copy_(self.squared_norm.sqrt())

    @torch.no_grad()
    def local_row_norm(self, lora_a_RI: torch.Tensor) -> torch.Tensor:
        """‖W + s·B A‖ of this rank's rows, float32. `lora_a_RI` is the full A."""
        # with the narrow factor first, the product takes two thirds of the time on a CPU
        w_a_RO = torch.cat([lora_a_RI @ slab.T for slab in row_slabs(local(self.weight))], 1)
        squared_O = local_rows(self.squared_norm, self.weight)
        return adapted_row_norm(squared_O, w_a_RO.T, lora_a_RI, local(self.lora_b), self.scaling)

    def _base_and_norm(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """W x without bias [..., O], and the row norm [O] float32."""
        lora_a_RI, lora_b_OR = self.lora_a.detach(), self.lora_b.detach()
        rows = x.reshape(-1, self.in_features)
        y = frozen_linear(torch.cat([rows, lora_a_RI.to(x.dtype)]), self.weight)
        base, w_a_RO = y[: len(rows)], y[len(rows) :].detach()
        norm_O = adapted_row_norm(self.squared_norm, w_a_RO.T.float(), lora_a_RI, lora_b_OR, self.scaling)
        return base.view(*x.shape[:-1], -1), norm_O

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O], in x's dtype. Disabled, the layer computes its base alone, without the magnitude."""
        if not self.enabled:
            return frozen_linear(x, self.weight, self.bias)
        base, norm_O = self._base_and_norm(x)
        gain_O = self.magnitude / norm_O
        if self.training and self.dropout > 0:
            return self._with_dropout(x, base, gain_O)
        # g ⊙ (B z) = (g ⊙ B) z: no more passes over the outputs than LoRA makes
        update = F.linear(self._down(x), (gain_O[:, None] * self.lora_b).to(x.dtype), self.bias)
        # in place, torch multiplies and adds in the gain's float32 and rounds once; bf16 steps by 0.8 % above a gain
        # of 1, where training moves it by less
        return update.addcmul_(base, gain_O)

    def _with_dropout(self, x: torch.Tensor, base: torch.Tensor, gain_O: torch.Tensor) -> torch.Tensor:
        """W x + b + (g - 1) ⊙ W d + g ⊙ s·B A d, with d the inputs after dropout.

        As in PEFT, the base's output sees all inputs, and the adapter's change of it only those that are kept.
        """
        kept = self._dropped(x)
        update = F.linear(self._down(kept), self.lora_b.to(x.dtype)).float()
        change = (gain_O - 1) * frozen_linear(kept, self.weight).float() + gain_O * update
        y = base.float() + change
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def to_wire(self, adapter: Mapping[str, torch.Tensor], norm_O: torch.Tensor | None) -> dict[str, torch.Tensor]:
        assert norm_O is not None
        return {**super().to_wire(adapter, norm_O), GAIN: adapter["magnitude"] / norm_O}

    @torch.no_grad()
    def from_wire(self, tensors: dict[str, torch.Tensor]) -> None:
        super().from_wire(tensors)
        self.magnitude.copy_(tensors[GAIN] * self.local_row_norm(self.lora_a))


class CachedDoRALinear(DoRALinear):
    """Caches the row norm instead. Exact, since the norm carries no gradient and changes only with A and B; call
    `inject.refresh` after every change of them."""

    norm: torch.Tensor
    """‖W + s·B A‖ by row, [O] float32."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank, scaling, dropout)
        self.register_buffer("norm", torch.empty_like(self.magnitude), persistent=False)

    @torch.no_grad()
    def reset_adapter(self) -> None:
        super().reset_adapter()
        self.norm.copy_(self.magnitude)

    def _base_and_norm(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return frozen_linear(x, self.weight), self.norm
