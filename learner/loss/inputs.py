"""What every loss sees of a micro-batch.

Shape letters: N response tokens, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One micro-batch of response tokens; [N] float32 where nothing else is said. It holds whole sequences."""

    learner_logprobs_N: torch.Tensor
    """By the policy being trained; carries the gradient."""
    proximal_logprobs_N: torch.Tensor
    """What the clip is around, see `Terms.proximal`."""
    actor_logprobs_N: torch.Tensor
    """By the engine that sampled the tokens."""
    ref_logprobs_N: torch.Tensor | None
    """By the base model; None where `kl_coeff` is 0."""
    advantages_N: torch.Tensor
    weights_N: torch.Tensor
    """Share of each token in the loss, see `tora.batching.batch.token_weights`."""
    shares_N: torch.Tensor
    """Share of each token in the step's means: the weights, scaled to sum to 1 over all micro-batches of all ranks."""
    sequence_N: torch.Tensor
    """int64 in [0, B): the sequence each token belongs to."""
    num_sequences: int
    """B."""


def sequence_sum(values_N: torch.Tensor, sequence_N: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """[B]: sum over each sequence's tokens."""
    return values_N.new_zeros(num_sequences).index_add(0, sequence_N, values_N)


def sequence_mean(values_N: torch.Tensor, sequence_N: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """[B]: mean over each sequence's tokens; 0 for a sequence without any."""
    counts_B = sequence_sum(torch.ones_like(values_N), sequence_N, num_sequences)
    return sequence_sum(values_N, sequence_N, num_sequences) / counts_B.clamp_min(1)
