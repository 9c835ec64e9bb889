"""SAPO: Soft Adaptive Policy Optimization (Gao et al. 2025, arXiv:2511.20347).

The mean over a sequence's tokens, then over sequences, is `loss_normalization: sequence`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from learner.loss.inputs import LossInputs
from learner.loss.objective import Terms, policy_ratio, total
from learner.loss.protocol import LossOutput
from tora.errors import ConfigError


@dataclass(frozen=True)
class SAPOLoss(Terms):
    """4/τ σ(τ (r - 1)) A: a gate instead of a clip. Its slope in r is 1 on policy and fades as r leaves 1."""

    requires: ClassVar = {"loss_normalization": "sequence"}
    tau_positive: float = 1.0
    """τ of tokens with a positive advantage; defaults are the paper's."""
    tau_negative: float = 1.05
    """τ of the other tokens, whose updates are less stable: a larger τ makes them fade sooner."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, tau in (("tau_positive", self.tau_positive), ("tau_negative", self.tau_negative)):
            if not 0 < tau < float("inf"):
                raise ConfigError(f"loss.{name}={tau} must be a number greater than 0.")

    def __call__(self, x: LossInputs) -> LossOutput:
        tau_N = torch.full_like(x.advantages_N, self.tau_negative).masked_fill(x.advantages_N > 0, self.tau_positive)
        gate_N = torch.sigmoid(tau_N * (policy_ratio(x) - 1)) * 4 / tau_N
        return total(self, x, gate_N * x.advantages_N, torch.zeros_like(gate_N, dtype=torch.bool))
