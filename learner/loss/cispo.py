"""CISPO: clipped importance-sampling policy optimization (Chen et al. 2025, MiniMax-M1, arXiv:2506.13585, eq. 4 and 5).

The mean over all tokens of a batch is `loss_normalization: token`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from learner.loss.inputs import LossInputs
from learner.loss.objective import Clip, policy_ratio, total
from learner.loss.protocol import LossOutput


@dataclass(frozen=True)
class CISPOLoss(Clip):
    """A sg(clip(r)) log π_learner: clipping bounds a token's weight but never removes its gradient."""

    requires: ClassVar = {"loss_normalization": "token"}
    clip_low: float = 1.0
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]; 1 means no lower bound, as in the paper."""
    clip_high: float = 4.0
    """The paper does not give its value; implementations commonly bound the weight at 5."""

    def __call__(self, x: LossInputs) -> LossOutput:
        ratio_N = policy_ratio(x).detach()
        weight_N = ratio_N.clamp(1 - self.clip_low, 1 + self.clip_high)
        return total(self, x, weight_N * x.advantages_N * x.learner_logprobs_N, weight_N != ratio_N)
