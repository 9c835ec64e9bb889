"""A frozen linear layer with a low-rank update: y = W x + s·B A x + b (LoRA, Hu et al. 2021, arXiv:2106.09685, eq. 3).

s is the factor that `scaling_of` returns. Shape letters: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from tora.adapters.snapshot import LORA_A, LORA_B
from tora.models.quantize import frozen_linear


class LoRALinear(nn.Module):
    """Takes over an `nn.Linear`'s parameters. A [R, I] and B [O, R] are float32, whatever the base's dtype."""

    use_dora = False

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float = 0.0) -> None:
        """`dropout`: the share of inputs that the low-rank update does not see in training mode."""
        super().__init__()
        self.in_features, self.out_features, self.scaling = base.in_features, base.out_features, scaling
        self.dropout = dropout
        self.weight, self.bias = base.weight, base.bias
        self.enabled = True
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_b = nn.Parameter(torch.empty(base.out_features, rank, dtype=torch.float32, device=device))

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Initialise A Kaiming-uniform and B zero, so that the layer starts out equal to its base.

        Call after the base's weights are loaded. If the layer was built on the meta device, this also moves the adapter
        to the weights' device.
        """
        for name, p in self.named_parameters():
            if p.is_meta:
                setattr(self, name, nn.Parameter(torch.empty_like(p, device=self.weight.device)))
        for name, buffer in self.named_buffers():
            if buffer.is_meta:
                setattr(self, name, torch.empty_like(buffer, device=self.weight.device))
        # drawn on the CPU, so that a seed means the same adapter on every device
        self.lora_a.copy_(nn.init.kaiming_uniform_(torch.empty_like(self.lora_a, device="cpu"), a=math.sqrt(5)))
        nn.init.zeros_(self.lora_b)

    def adapter_params(self) -> list[str]:
        """Names of this layer's trained parameters (torchtune's adapter protocol)."""
        return ["lora_a", "lora_b"]

    def _down(self, x: torch.Tensor) -> torch.Tensor:
        """s·A x, [..., R] in x's dtype. The scaling is applied here because this is the smallest tensor."""
        return self.scaling * F.linear(x, self.lora_a.to(x.dtype))

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        """x after dropout, which is x itself outside training mode."""
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O], in x's dtype. Disabled, the layer computes its base alone."""
        y = frozen_linear(x, self.weight, self.bias)
        return y + F.linear(self._down(self._dropped(x)), self.lora_b.to(x.dtype)) if self.enabled else y

    def to_wire(self, adapter: Mapping[str, torch.Tensor], norm_O: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """This layer's tensors of a snapshot, by suffix, with the scaling folded into B.

        `adapter`: the full parameters that `adapter_params` names. `norm_O`: the full row norm; None except for DoRA.
        """
        return {LORA_A: adapter["lora_a"], LORA_B: self.scaling * adapter["lora_b"]}

    @torch.no_grad()
    def from_wire(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `to_wire`: afterwards the layer computes the same function as the sender's."""
        self.lora_a.copy_(tensors[LORA_A])
        self.lora_b.copy_(tensors[LORA_B] / self.scaling)
