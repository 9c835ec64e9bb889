"""The input of every loss: one micro-batch of response tokens.

Shape letters: N response tokens, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One micro-batch of response tokens, in complete sequences. Tensors are [N] float32 unless noted."""

    learner_logprobs_N: torch.Tensor
    """Of the policy being trained; these carry the gradient."""
    proximal_logprobs_N: torch.Tensor
    """Of the policy that the loss clips around, see `Loss.proximal`."""
    actor_logprobs_N: torch.Tensor
    """As computed by the engine that sampled the tokens."""
    ref_logprobs_N: torch.Tensor | None
    """Of the reference policy; None if `kl_coeff` is 0."""
    entropy_N: torch.Tensor
    """Entropy of the policy being trained at each token's position, in nats; carries a gradient too."""
    advantages_N: torch.Tensor
    weights_N: torch.Tensor
    """Weight of each token in the loss, see `tora.batching.batch.token_weights`."""
    shares_N: torch.Tensor
    """Weight of each token in metrics that are means: `weights_N`, scaled to sum to 1 over all ranks' micro-batches.
    With `step_parts` both are too large or too small by one factor, with which the learner multiplies the sums."""
    sequence_N: torch.Tensor
    """int64 in [0, B): the sequence each token belongs to."""
    num_sequences: int
    """B."""


def sequence_sum(values_N: torch.Tensor, sequence_N: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """The sum over each sequence's tokens, [B]."""
    return values_N.new_zeros(num_sequences).index_add(0, sequence_N, values_N)


def sequence_mean(values_N: torch.Tensor, sequence_N: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """The mean over each sequence's tokens, [B]; 0 for a sequence without tokens."""
    counts_B = sequence_sum(torch.ones_like(values_N), sequence_N, num_sequences)
    return sequence_sum(values_N, sequence_N, num_sequences) / counts_B.clamp_min(1)
