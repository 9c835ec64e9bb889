"""The GRPO objective on flat response tokens. Pure: tensors in, loss and metrics out.

Shape letters: N response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One micro-batch of response tokens; all [N] float32."""

    learner_logprobs_N: torch.Tensor
    """By the policy being trained; carries the gradient."""
    proximal_logprobs_N: torch.Tensor
    """By the learner as it was before this step's first update; the clip is around it."""
    actor_logprobs_N: torch.Tensor
    """By the engine that sampled the tokens."""
    ref_logprobs_N: torch.Tensor | None
    """By the base model; None where `kl_coeff` is 0."""
    advantages_N: torch.Tensor
    weights_N: torch.Tensor
    """Share of each token in the loss; sums to 1 over the step."""


def kl_estimate(
    learner_logprobs_N: torch.Tensor, ref_logprobs_N: torch.Tensor, kind: Literal["k1", "k2", "k3"]
) -> torch.Tensor:
    """Per-token estimate of KL(policy ‖ reference) from the policy's own samples.

    With d = ref - learner: k1 = -d, k2 = d²/2, k3 = exp(d) - d - 1 (Schulman, "Approximating KL divergence", 2020).
    """
    d = ref_logprobs_N - learner_logprobs_N
    if kind == "k1":
        return -d
    if kind == "k2":
        return d.square() / 2
    return d.expm1() - d  # exp(d) - 1 loses small d to rounding


def importance_weights(proximal_logprobs_N: torch.Tensor, actor_logprobs_N: torch.Tensor, cap: float) -> torch.Tensor:
    """min(π_proximal / π_actor, cap) per token, a constant to autograd (truncated importance sampling)."""
    return (proximal_logprobs_N - actor_logprobs_N).detach().exp().clamp_max(cap)


@dataclass(frozen=True)
class GRPOLoss:
    """-Σ w · (c · min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) - kl_coeff · KL), r = π_learner / π_proximal.

    PPO's clipped surrogate (Schulman et al. 2017, eq. 7) with GRPO's advantages and KL term (Shao et al. 2024, eq. 3);
    c is the truncated importance weight between learner and actor.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coeff: float = 0.0
    kl_type: Literal["k1", "k2", "k3"] = "k3"
    importance_correction: Literal["none", "token_tis"] = "token_tis"
    importance_cap: float = 2.0

    def __call__(self, x: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of these tokens, and metrics weighted alike, so that both add up over a step's micro-batches."""
        ratio_N = (x.learner_logprobs_N - x.proximal_logprobs_N).exp()
        clipped_N = ratio_N.clamp(1 - self.clip_low, 1 + self.clip_high)
        surrogate_N = torch.minimum(ratio_N * x.advantages_N, clipped_N * x.advantages_N)
        if self.importance_correction == "token_tis":
            surrogate_N = surrogate_N * importance_weights(
                x.proximal_logprobs_N, x.actor_logprobs_N, self.importance_cap
            )
        loss = -(x.weights_N * surrogate_N).sum()
        metrics = {"loss/policy": loss.detach()}
        with torch.no_grad():
            is_clipped_N = (clipped_N * x.advantages_N < ratio_N * x.advantages_N).float()
            metrics["loss/clip_share"] = (x.weights_N * is_clipped_N).sum()
        if x.ref_logprobs_N is not None:
            kl = (x.weights_N * kl_estimate(x.learner_logprobs_N, x.ref_logprobs_N, self.kl_type)).sum()
            loss = loss + self.kl_coeff * kl
            metrics["kl/mean"] = kl.detach()
        metrics["loss/total"] = loss.detach()
        return loss, metrics
