"""GSPO: Group Sequence Policy Optimization (Zheng et al. 2025, arXiv:2507.18071, eq. 5 and 7).

The mean over sequences is `loss_normalization: sequence`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from learner.loss.correction import Correction
from learner.loss.inputs import LossInputs, sequence_mean
from learner.loss.objective import Clip, clipped_surrogate, total
from learner.loss.protocol import LossOutput
from learner.loss.ratio import bounded_exp


@dataclass(frozen=True)
class GSPOLoss(Clip):
    """The clipped surrogate with one ratio per sequence, the geometric mean of its tokens' ratios (eq. 7).

    A sequence's ratio is corrected by a weight of the sequence, so that without clips the gradient is that of
    `proximal: actor`, to rounding. Weights of its tokens multiply the ratio by their mean instead of their geometric
    mean: where the log-ratios of learner and actor have a standard deviation of 0.02, 0.1, 0.5 and 1, gradients are off
    by 0.02 %, 0.5 %, 10 % and 33 %.
    """

    requires: ClassVar = {"loss_normalization": "sequence"}
    corrections: ClassVar = ("none", "sequence_tis", "sequence_mask")
    clip_low: float = 3e-4
    """The sequence ratio is clipped to [1 - clip_low, 1 + clip_high]; defaults from section 5.1 of the paper."""
    clip_high: float = 4e-4
    importance_correction: Correction = "sequence_tis"

    def __call__(self, x: LossInputs) -> LossOutput:
        log_ratio_N = x.learner_logprobs_N - x.proximal_logprobs_N
        ratio_B = bounded_exp(sequence_mean(log_ratio_N, x.sequence_N, x.num_sequences))
        objective_N, is_clipped_N = clipped_surrogate(
            ratio_B[x.sequence_N], x.advantages_N, self.clip_low, self.clip_high
        )
        return total(self, x, objective_N, is_clipped_N)
