"""A step in progress on one rank.

Shape letters: N response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from learner.device_batch import Inputs
from tora.types import MicroBatch


class Sums:
    """What the micro-batches of one update add up to on this rank; their gradients are in the parameters."""

    def __init__(self) -> None:
        self.before: list[torch.Tensor] = []
        """Log-probs before the update, [N] for each micro-batch."""
        self._loss = torch.zeros(())
        self._metrics: dict[str, torch.Tensor] = {}

    def add(self, loss: torch.Tensor, metrics: Mapping[str, torch.Tensor], before_N: torch.Tensor) -> None:
        self.before.append(before_N)
        self._loss = self._loss.to(loss.device) + loss.detach()
        for name, value in metrics.items():
            self._metrics[name] = self._metrics.get(name, torch.zeros_like(loss)) + value

    @property
    def names(self) -> list[str]:
        """Of the metrics, in the order of `values`."""
        return list(self._metrics)

    def values(self, scale: float) -> torch.Tensor:
        """The loss and then each metric, times `scale`; float64."""
        return torch.stack([self._loss, *self._metrics.values()]).double() * scale


@dataclass(slots=True)
class BegunStep:
    """What a step was given so far, as one batch or in parts."""

    of_all_ranks: list[MicroBatch] = field(default_factory=list)
    share: list[MicroBatch] = field(default_factory=list)
    """This rank's. The next three lists have an entry for each of them."""
    inputs: list[Inputs] = field(default_factory=list)
    ref: list[torch.Tensor | None] = field(default_factory=list)
    """Log-probs under the reference policy, [N] each; None without a KL term."""
    at_start: list[torch.Tensor] | None = None
    """Log-probs of the policy before the step, [N] each; None if those are what the only update computes."""
    sums: Sums = field(default_factory=Sums)
    """Of the first update."""

    def total_weight(self, mini_batch: int) -> float:
        """Of all ranks' tokens in a mini-batch; 1 if it is 0."""
        own = (m.weights_N for m in self.of_all_ranks if m.mini_batch == mini_batch)
        return sum(float(weights_N.sum(dtype="float64")) for weights_N in own) or 1.0
