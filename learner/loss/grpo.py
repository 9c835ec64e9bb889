"""GRPO: Group Relative Policy Optimization (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, eq. 3).

Its mean over a completion's tokens and then over completions is `loss_normalization: sequence`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from learner.loss.inputs import LossInputs
from learner.loss.objective import LossOutput, check, clipped_surrogate, policy_ratio, total


@dataclass(frozen=True)
class GRPOLoss:
    """PPO's clipped surrogate of each token, r = π_learner / π_proximal, with the KL term in the loss.

    The other fields: see `learner.loss.objective.Terms`. Raises `ConfigError` for values out of range.
    """

    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = 0.2
    kl_coeff: float = 0.0
    kl_type: Literal["k1", "k2", "k3"] | None = None
    kl_in: Literal["loss", "reward"] = "loss"
    proximal: Literal["learner", "actor"] = "learner"
    importance_correction: Literal["none", "token_tis", "token_mask", "sequence_mask"] = "token_tis"
    importance_low: float | None = None
    importance_high: float | None = None

    def __post_init__(self) -> None:
        check(self, self.clip_low, self.clip_high)

    def __call__(self, x: LossInputs) -> LossOutput:
        objective_N, is_clipped_N = clipped_surrogate(policy_ratio(x), x.advantages_N, self.clip_low, self.clip_high)
        return total(self, x, objective_N, is_clipped_N)
