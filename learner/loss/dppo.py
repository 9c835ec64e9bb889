"""DPPO: Divergence Proximal Policy Optimization (Qi et al. 2026, arXiv:2602.04879, "Rethinking the Trust Region in LLM
Reinforcement Learning").

The trust region bounds the divergence of a token's distribution instead of its ratio. The divergence is the paper's
binary approximation, which tells the sampled token from all others. The region is around the policy that sampled, as in
the paper: `proximal: actor`, without an importance correction.

Shape letters: N response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from learner.loss.correction import Correction
from learner.loss.inputs import LossInputs
from learner.loss.objective import Clip, policy_ratio, total
from learner.loss.protocol import LossOutput, Proximal
from tora.errors import ConfigError

Divergence = Literal["tv", "kl"]


@dataclass(frozen=True)
class DPPOLoss(Clip):
    """M r A, where M is 0 for a token whose divergence from the proximal policy is above its bound and whose update
    would move it further away, and 1 otherwise."""

    clip_low: float = 0.15
    """Largest divergence of a token with a negative advantage that has become less likely."""
    clip_high: float = 0.15
    """Largest divergence of a token with a positive advantage that has become more likely."""
    divergence: Divergence = "tv"
    """`tv`: total variation, |π - μ|. `kl`: μ log(μ / π) + (1 - μ) log((1 - μ) / (1 - π))."""
    ratio_high: float = 20.0
    """The ratio is truncated here, without a gradient to the bound. The paper's section 5.4 finds that low bounds harm;
    this one only keeps a token of tiny probability from dominating a step."""
    proximal: Proximal = "actor"
    importance_correction: Correction = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in get_args(Divergence):
            raise ConfigError(f"loss.divergence={self.divergence} must be one of {', '.join(get_args(Divergence))}.")
        if not 1 <= self.ratio_high < float("inf"):
            raise ConfigError(f"loss.ratio_high={self.ratio_high} must be a number of at least 1.")

    def __call__(self, x: LossInputs) -> LossOutput:
        ratio_N = policy_ratio(x).detach()
        masked_N = self._outside(x)
        weight_N = ratio_N.clamp_max(self.ratio_high).masked_fill(masked_N, 0.0)
        # the value is M r A and its gradient M r A ∇ log π, with r truncated in both
        score_N = 1 + x.learner_logprobs_N - x.learner_logprobs_N.detach()
        return total(self, x, weight_N * x.advantages_N * score_N, masked_N | (ratio_N > self.ratio_high))

    @torch.no_grad()
    def _outside(self, x: LossInputs) -> torch.Tensor:
        """The tokens that the mask removes, [N] bool."""
        learner_N, proximal_N = x.learner_logprobs_N, x.proximal_logprobs_N
        away_N = torch.where(x.advantages_N > 0, learner_N > proximal_N, learner_N < proximal_N)
        bound_N = torch.full_like(x.advantages_N, self.clip_low).masked_fill(x.advantages_N > 0, self.clip_high)
        return away_N & ~(binary_divergence(learner_N, proximal_N, self.divergence) <= bound_N)


def binary_divergence(logprobs_N: torch.Tensor, proximal_logprobs_N: torch.Tensor, kind: Divergence) -> torch.Tensor:
    """The divergence of "this token" against "another one", from the proximal policy's, [N].

    `kl` adds 1e-8 to the probabilities of another token, as verl does: in float32 a probability near 1 rounds to 1, and
    the divergence would be infinite.
    """
    logprobs_N, proximal_logprobs_N = logprobs_N.clamp_max(0), proximal_logprobs_N.clamp_max(0)
    if kind == "tv":
        return (logprobs_N.exp() - proximal_logprobs_N.exp()).abs()
    p_other_N, q_other_N = (-torch.expm1(lp_N) for lp_N in (logprobs_N, proximal_logprobs_N))
    this_N = proximal_logprobs_N.exp() * (proximal_logprobs_N - logprobs_N)
    return this_N + q_other_N * ((q_other_N + 1e-8) / (p_other_N + 1e-8)).log()
