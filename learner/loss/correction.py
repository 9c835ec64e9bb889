"""Importance correction for the gap between the learner and the actor that sampled, with ρ = π_proximal / π_actor.

- `token_tis`: min(ρ_t, high). Truncated importance sampling (Yao et al. 2025, "Your Efficient RL Framework Secretly
  Brings You Off-Policy RL Training").
- `token_mask`: ρ_t where low <= ρ_t <= high, else 0. IcePop (Ling Team 2025, arXiv:2510.18855, "Every Step Evolves").
- `sequence_tis`: min(ρ, high) with one ρ per sequence, the geometric mean exp(mean_t log ρ_t), for all of its tokens:
  truncated importance sampling with the ratio that GSPO clips (Zheng et al. 2025, arXiv:2507.18071, eq. 7). The
  sequence's two ratios then multiply to its ratio to the actor. TRL's and verl's sequence weights are products instead.
- `sequence_mask`: that ρ where low <= ρ <= high, else 0.
  Masked importance sampling at the geometric level (Liu et al. 2025, "When Speed Kills Stability"): unlike the product
  of the ratios, the mean can have the same bounds for short and long sequences.

Masked tokens still count in the denominator of the loss, as in IcePop.

Shape letters: N response tokens.
"""

from __future__ import annotations

from typing import Literal

import torch

from learner.loss.inputs import LossInputs, sequence_mean
from learner.loss.ratio import bounded_exp

Correction = Literal["none", "token_tis", "token_mask", "sequence_tis", "sequence_mask"]

BOUNDS: dict[str, tuple[float, float]] = {
    "token_tis": (0.0, 2.0),
    "token_mask": (0.5, 5.0),
    "sequence_tis": (0.0, 2.0),
    "sequence_mask": (0.99, 1.01),
}
"""Default low and high bounds: the papers' values, and SkyRL's for the geometric mean."""


def importance_weights(
    x: LossInputs, kind: Correction, low: float | None, high: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [N] without gradient, and the tokens whose weight a bound changed, [N] bool.

    A bound of None takes its default from `BOUNDS`.
    """
    log_ratio_N = (x.proximal_logprobs_N - x.actor_logprobs_N).detach()
    if kind == "none":
        return torch.ones_like(log_ratio_N), torch.zeros_like(log_ratio_N, dtype=torch.bool)
    default_low, default_high = BOUNDS[kind]
    low, high = default_low if low is None else low, default_high if high is None else high
    if kind in ("sequence_tis", "sequence_mask"):
        log_ratio_N = sequence_mean(log_ratio_N, x.sequence_N, x.num_sequences)[x.sequence_N]
    ratio_N = bounded_exp(log_ratio_N)
    if kind in ("token_tis", "sequence_tis"):
        return ratio_N.clamp_max(high), ratio_N > high
    outside_N = (ratio_N < low) | (ratio_N > high)
    return ratio_N.masked_fill(outside_N, 0.0), outside_N
