"""Random and hand-made inputs of the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from learner.loss import (
    CISPOLoss,
    DAPOLoss,
    DPPOLoss,
    DrGRPOLoss,
    GRPOLoss,
    GSPOLoss,
    LossInputs,
    SAPOLoss,
)
from tora.batching.batch import token_weights

LENGTHS = (5, 1, 9, 4, 12, 3)

LOSSES: dict[Any, str] = {
    GRPOLoss: "sequence",
    DrGRPOLoss: "constant",
    DAPOLoss: "token",
    GSPOLoss: "sequence",
    CISPOLoss: "token",
    DPPOLoss: "token",
    SAPOLoss: "sequence",
}
"""Each loss with the normalisation of its paper."""
CORRECTED = [(loss, correction) for loss in LOSSES for correction in loss.corrections]


def corrected(loss_class: Any, correction: str, **settings: Any) -> Any:
    """The loss with a correction, around the learner's policy: none is needed around the actor's, DPPO's default."""
    return loss_class(importance_correction=correction, proximal="learner", **settings)


def inputs(
    loss_class: Any = GRPOLoss, *, with_ref: bool = True, seed: int = 0, dtype: torch.dtype = torch.float64
) -> LossInputs:
    """Sequences of several lengths. GSPO clips more narrowly, so its proximal policy is closer."""
    generator = torch.Generator().manual_seed(seed)
    counts, lengths = sum(LENGTHS), torch.tensor(LENGTHS)

    def draw(scale: float, count: int = counts) -> torch.Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64) * scale

    learner = -draw(1.0).abs()
    weights_B = torch.tensor(token_weights(LENGTHS, LOSSES[loss_class], 20), dtype=torch.float64)
    weights = weights_B.repeat_interleave(lengths)
    tensors = {
        "proximal_logprobs_N": learner + draw(1e-3 if loss_class is GSPOLoss else 0.3),
        "actor_logprobs_N": learner + draw(0.5),
        "entropy_N": -learner,
        "advantages_N": draw(1.0, len(LENGTHS)).repeat_interleave(lengths),
        "weights_N": weights,
        "shares_N": weights / weights.sum(),
    }
    if loss_class is DPPOLoss:  # the one loss that reads probabilities, which are at most 1
        tensors["proximal_logprobs_N"] = tensors["proximal_logprobs_N"].clamp_max(-1e-3)
    return LossInputs(
        learner_logprobs_N=learner.to(dtype).clone().requires_grad_(),
        ref_logprobs_N=(learner + draw(0.4)).to(dtype) if with_ref else None,
        sequence_N=torch.arange(len(LENGTHS)).repeat_interleave(lengths),
        num_sequences=len(LENGTHS),
        **{name: tensor.to(dtype) for name, tensor in tensors.items()},
    )


def by_hand(
    learner: Sequence[float], proximal: Sequence[float], advantages: Sequence[float], weights: Sequence[float]
) -> LossInputs:
    """One sequence whose actor is the proximal policy."""
    return LossInputs(
        learner_logprobs_N=torch.tensor(learner, requires_grad=True),
        proximal_logprobs_N=torch.tensor(proximal),
        actor_logprobs_N=torch.tensor(proximal),
        ref_logprobs_N=None,
        entropy_N=torch.zeros(len(learner)),
        advantages_N=torch.tensor(advantages),
        weights_N=torch.tensor(weights),
        shares_N=torch.tensor(weights),
        sequence_N=torch.zeros(len(learner), dtype=torch.int64),
        num_sequences=1,
    )
