"""GRPO: Group Relative Policy Optimization (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, eq. 3).

Its mean over a completion's tokens and then over completions is `loss_normalization: sequence`.
"""

from __future__ import annotations

from dataclasses import dataclass

from learner.loss.objective import TokenClip


@dataclass(frozen=True)
class GRPOLoss(TokenClip):
    """PPO's clipped surrogate of each token, r = π_learner / π_proximal, with the KL term in the loss."""

    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = 0.2
