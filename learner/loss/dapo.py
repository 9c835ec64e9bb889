"""DAPO: Decoupled Clip and Dynamic Sampling Policy Optimization (Yu et al. 2025, arXiv:2503.14476, eq. 8).

This file implements clip-higher (eq. 10). The mean over tokens (eq. 12) is `loss_normalization: token`, overlong reward
shaping (eq. 13) is `tora.rewards.overlong`, and every run samples dynamically (eq. 11).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from learner.loss.objective import TokenClip


@dataclass(frozen=True)
class DAPOLoss(TokenClip):
    """GRPO's surrogate with a higher upper clip, so that unlikely tokens can still gain probability."""

    requires: ClassVar = {"loss_normalization": "token"}
    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = 0.28
