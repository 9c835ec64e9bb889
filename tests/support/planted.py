"""A loss with a planted value that is not finite, and batches with one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from learner.loss import GRPOLoss, LossInputs
from learner.loss.protocol import LossOutput
from tora.types import TrainBatch


@dataclass(frozen=True)
class PlantedLoss(GRPOLoss):
    """GRPO's, except in its calls from `first` up to `last`, counted from 0, on one rank or all."""

    plant: str = "loss"
    """`loss`: a loss of nan with a sound gradient. `gradient`: an infinite gradient with a sound loss."""
    first: int = 0
    last: int = 0
    rank: int | None = None
    calls: Iterator[int] = field(default_factory=itertools.count)

    def __call__(self, x: LossInputs) -> LossOutput:
        loss, metrics = super().__call__(x)
        here = self.rank is None or self.rank == int(os.environ.get("RANK", "0"))
        if not (self.first <= next(self.calls) <= self.last and here):
            return loss, metrics
        if self.plant == "loss":
            return loss + torch.nan, {**metrics, "loss/total": loss.detach() + torch.nan}
        zero_N = x.learner_logprobs_N - x.learner_logprobs_N.detach()
        return loss + zero_N.sqrt().sum(), metrics


def with_bad_logprob(batch: TrainBatch, value: float = torch.nan) -> TrainBatch:
    """The first actor log-prob of the last micro-batch is `value`."""
    *others, last = batch.micro_batches
    logprobs_N = last.actor_logprobs_N.copy()
    logprobs_N[0] = value
    return replace(batch, micro_batches=(*others, replace(last, actor_logprobs_N=logprobs_N)))
