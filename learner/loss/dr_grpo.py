"""Dr. GRPO: GRPO done right (Liu et al. 2025, "Understanding R1-Zero-Like Training", arXiv:2503.20783, section 3.2).

GRPO's surrogate without its two biases: `loss_normalization: constant` in place of the completion's length, and
`normalize_advantages: false` in place of the division by the group's standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from learner.loss.objective import TokenClip


@dataclass(frozen=True)
class DrGRPOLoss(TokenClip):
    """GRPO's surrogate; what sets Dr. GRPO apart is in the weights and advantages that it is given."""

    requires: ClassVar = {"loss_normalization": "constant", "normalize_advantages": False}
    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = 0.2
