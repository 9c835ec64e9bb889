"""Dr. GRPO: GRPO done right (Liu et al. 2025, "Understanding R1-Zero-Like Training", arXiv:2503.20783, section 3.2).

GRPO's surrogate without its two biases: `loss_normalization: constant` in place of the completion's length, and
`normalize_advantages: false` in place of the division by the group's standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from learner.loss.inputs import LossInputs
from learner.loss.objective import LossOutput, check, clipped_surrogate, policy_ratio, total


@dataclass(frozen=True)
class DrGRPOLoss:
    """GRPO's surrogate; what sets Dr. GRPO apart is in the weights and advantages that it is given.

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
