"""DAPO: Decoupled Clip and Dynamic Sampling Policy Optimization (Yu et al. 2025, arXiv:2503.14476, eq. 8).

Clip-higher (eq. 10) is here. The mean over tokens (eq. 12) is `loss_normalization: token`, the overlong shaping (eq.
13) `tora.rewards.overlong`, and the dynamic sampling (eq. 11) what every run does with groups without signal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from learner.loss.objective import TokenClip


@dataclass(frozen=True)
class DAPOLoss(TokenClip):
    """GRPO's surrogate with more room above than below, so that unlikely tokens can still grow."""

    requires: ClassVar = {"loss_normalization": "token"}
    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = 0.28
