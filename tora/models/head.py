"""The product of hidden states and the head's weight, in float32, and what a model does to it before the softmax.

A bf16 product rounds each logit to 8 bits: by up to 0.06 nat at a logit of 16 to 32, before the temperature divides it.
Shape letters: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class LogitMap:
    """logits = cap · tanh(scale · x / cap), or scale · x without a cap: the soft-capping of Gemma 2 (arXiv:2408.00118,
    section 2), and the scales of Granite and Cohere."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape; x itself if there is nothing to do."""
        x = x if self.scale == 1 else x * self.scale
        return x if self.cap is None else (x / self.cap).tanh() * self.cap

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """The derivative, as a function of the map's own output."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap).square())


def head_logits(hidden_NH: torch.Tensor, head_VH: torch.Tensor, *, fp32: bool) -> torch.Tensor:
    """[N, V] float32, a fresh tensor where the inputs are of lower precision.

    `fp32`: keep the float32 sums of products of bf16 numbers; otherwise they are rounded to bf16 first. Without effect
    on float32 inputs.
    """
    if not fp32 or hidden_NH.dtype == torch.float32:
        return F.linear(hidden_NH, head_VH).float()
    if hidden_NH.is_cuda:
        return torch.mm(hidden_NH, head_VH.T, out_dtype=torch.float32)
    # torch has no such kernel for a CPU: a second product yields what rounding the first one dropped
    rounded_NV = F.linear(hidden_NH, head_VH)
    dropped_NV = torch.addmm(rounded_NV, hidden_NH, head_VH.T, beta=-1)
    return rounded_NV.float().add_(dropped_NV)
