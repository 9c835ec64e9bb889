"""GRPO: Group Relative Policy Optimization (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, eq. 3).

The paper's mean over a completion's tokens, then over completions, is `loss_normalization: sequence`.
"""

from __future__ import annotations

from dataclasses import dataclass

from learner.loss.objective import TokenClip


@dataclass(frozen=True)
class GRPOLoss(TokenClip):
    """PPO's clipped surrogate per token with r = π_learner / π_proximal, and optionally a KL term."""

    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = 0.2
