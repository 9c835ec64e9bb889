"""The contract between the learner and a loss."""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from learner.loss.inputs import LossInputs
from learner.loss.kl import KLPlace, KLType
from tora.config.components import make
from tora.config.schema import Component
from tora.errors import ConfigError

Proximal = Literal["learner", "actor"]
ReferenceKind = Literal["initial", "base"]
LossOutput = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""The loss of one micro-batch, a scalar that carries the gradient, and detached scalar metrics by name."""


class Loss(Protocol):
    """An objective on flat response tokens, as a callable with five attributes that the learner reads.

    Both outputs must be additive over micro-batches: the learner calls the loss once per micro-batch and rank, calls
    `backward` on each result, and sums losses, gradients and metrics over all of them. So a loss sums over tokens,
    with `x.weights_N` for the loss and `x.shares_N` for metrics that are means, and never divides by the number of
    tokens or sequences of its micro-batch. A micro-batch holds whole sequences, but perhaps only part of a group.

    `learner.loss.objective.Terms` supplies the attributes, their validation and the terms that all losses share.

    Example:
        @dataclass(frozen=True)
        class ReinforceLoss(Terms):
            def __call__(self, x: LossInputs) -> LossOutput:
                objective_N = x.advantages_N * x.learner_logprobs_N
                return total(self, x, objective_N, torch.zeros_like(objective_N, dtype=torch.bool))
    """

    @property
    def kl_coeff(self) -> float:
        """β, at least 0. If it is 0 the learner computes no reference log-probs and `x.ref_logprobs_N` is None."""
        ...

    @property
    def kl_type(self) -> KLType | None:
        """The KL estimator; None selects the default for `kl_in`, see `learner.loss.kl.kind_of`. With
        `kl_in="reward"` the learner itself applies it."""
        ...

    @property
    def kl_in(self) -> KLPlace:
        """`loss`: the loss adds the KL term. `reward`: the learner subtracts β Σ_t KL_t from each sequence's reward and
        recomputes the advantages; the loss must not add it again."""
        ...

    @property
    def reference(self) -> ReferenceKind:
        """The policy behind `x.ref_logprobs_N`: the policy as training began (`initial`), or the base model without an
        adapter (`base`)."""
        ...

    @property
    def proximal(self) -> Proximal:
        """The policy whose log-probs the learner passes as `x.proximal_logprobs_N`: its own at the start of the step
        (`learner`), or those of the engine that sampled the tokens (`actor`)."""
        ...

    def __call__(self, x: LossInputs) -> LossOutput:
        """The loss and metrics of one micro-batch, each additive over micro-batches."""
        ...


_MEMBERS = ("kl_coeff", "kl_type", "kl_in", "reference", "proximal", "__call__")


def build_loss(component: Component) -> Loss:
    """The config's loss. Raises ConfigError if it cannot be built or lacks a member of `Loss`."""
    loss = make(component, "loss")
    if missing := [name for name in _MEMBERS if not hasattr(loss, name)]:
        raise ConfigError(
            f"loss._component_={component['_component_']} lacks {', '.join(missing)}; "
            "learner.loss.protocol.Loss documents what a loss needs."
        )
    return loss
