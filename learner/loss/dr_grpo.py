"""Dr. GRPO: GRPO done right (Liu et al. 2025, "Understanding R1-Zero-Like Training", arXiv:2503.20783, section 3.2).

GRPO's surrogate without two biases: `loss_normalization: constant` replaces the division by the completion's length,
and `normalize_advantages: false` drops the division by the group's standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from learner.loss.objective import TokenClip


@dataclass(frozen=True)
class DrGRPOLoss(TokenClip):
    """GRPO's surrogate; Dr. GRPO differs in the token weights and advantages that it is applied to."""

    requires: ClassVar = {"loss_normalization": "constant", "normalize_advantages": False}
    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = 0.2
