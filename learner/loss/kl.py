"""The KL divergence from the reference policy, in the loss or in the reward.

Estimators: Schulman, "Approximating KL divergence", 2020; k3 in the loss is GRPO's (Shao et al. 2024, arXiv:2402.03300,
eq. 4). In the reward: r - β log(π / π_ref), as in RLHF (Ouyang et al. 2022, arXiv:2203.02155, eq. 2).

Shape letters: N response tokens, B sequences.
"""

from __future__ import annotations

from typing import Literal

import torch

from learner.loss.inputs import sequence_sum
from learner.loss.ratio import bounded_expm1

KLType = Literal["k1", "k2", "k3"]
KLPlace = Literal["loss", "reward"]


def kind_of(kl_type: KLType | None, kl_in: KLPlace) -> KLType:
    """The estimator to use: `kl_type`, or by default k3 in the loss and k1 in the reward.

    As a loss term, k1's gradient has mean zero. As a reward term, only k1 gives an unbiased value and policy gradient.
    """
    return kl_type or ("k3" if kl_in == "loss" else "k1")


def kl_estimate(logprobs_N: torch.Tensor, ref_logprobs_N: torch.Tensor, kind: KLType) -> torch.Tensor:
    """Estimate of KL(π ‖ reference) at each token, [N] in nats, from tokens that π sampled; `logprobs_N` are π's.

    With d = log π_ref - log π: k1 = -d, k2 = d²/2, k3 = exp(d) - d - 1, with `bounded_expm1` for exp(d) - 1. All are
    finite where the log-probs are, and so are their gradients.
    """
    d = ref_logprobs_N - logprobs_N
    if kind == "k1":
        return -d
    if kind == "k2":
        return d.square() / 2
    return bounded_expm1(d) - d


@torch.no_grad()
def sequence_kl(
    actor_logprobs_N: torch.Tensor,
    ref_logprobs_N: torch.Tensor,
    sequence_N: torch.Tensor,
    num_sequences: int,
    kind: KLType,
) -> torch.Tensor:
    """Σ_t KL_t of each sequence, between the policy that sampled it and the reference; [B] float64, in nats."""
    kl_N = kl_estimate(actor_logprobs_N.double(), ref_logprobs_N.double(), kind)
    return sequence_sum(kl_N, sequence_N, num_sequences)
